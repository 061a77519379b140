"""The network that a submodel must agree with: the full one, with the removed entries at zero."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.coupling.analysis import Analysis, cut
from cahfp_cli.coupling.comparison import device_of, drawn_samples, largest_difference
from cahfp_cli.coupling.copying import copy_with, tensors_of
from cahfp_cli.coupling.groups import ChannelGroups
from cahfp_cli.errors import VerificationError

Mask = NDArray[np.bool_]


def masked(model: nn.Module, groups: ChannelGroups, kept: Mask) -> nn.Module:
    """A copy of a network with the entries of all groups that are not kept at zero, in evaluation mode."""
    named = tensors_of(model)
    indices = {id(named[name]): axes for name, axes in groups.indices(kept).items()}  # of tied ones a name is enough

    def zeroed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        result = tensor.clone()
        for axis, index in enumerate(indices.get(id(named[name]), ())):
            if index is not None:
                dead = np.setdiff1d(np.arange(tensor.shape[axis]), index)
                result.index_fill_(axis, torch.from_numpy(dead).to(tensor.device), 0)
        return result

    return copy_with(model, zeroed).eval()


def check_submodel(
    model: nn.Module, analysis: Analysis, kept: Mask, compact: nn.Module, samples: torch.Tensor | None = None
) -> None:
    """Compare a submodel with the network whose removed entries are zero, on numbers.

    Groups whose removal is not the same as zeroing (`ChannelGroups.not_mask_equivalent`) are kept for this, in a cut of
    their own; a network that draws random numbers, as many as its widths say, cannot be compared.

    Args:
        kept: bool (groups,). compact: what `cut` gave for it, with the weights that it was cut with.
        samples: (n, *input shape), at least two; random ones are drawn without.
    Raises: VerificationError: they differ.
    """
    if analysis.behaviour.draws or not analysis.behaviour.repeatable:
        return
    groups = analysis.groups
    by_nature = np.isin(groups.family, list(groups.not_mask_equivalent))
    if (by_nature & ~kept).any():
        kept = kept | by_nature
        compact = cut(model, analysis, kept)[0]
    device = device_of(model)
    given = samples if samples is not None else drawn_samples(analysis.input_shape, analysis.dtype, device)
    full = masked(model, groups, kept)
    difference = largest_difference(full, compact.to(device), given.to(device), analysis.default_dtype)
    if difference is not None:
        raise VerificationError(
            f"the submodel computes something else than the network with the removed channels at zero ({difference}).\n"
            "Nothing was written: find the layer at fault with --exclude, and please report it."
        )
