"""What can be pruned of a network, what cannot and why: the groups of an analysis as a report."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from cahfp_cli.coupling.analysis import Analysis
from cahfp_cli.coupling.groups import KEPT


@dataclass(frozen=True)
class FamilyCoverage:
    """One family: its number of groups and the fewest that it may keep; the tensors that lose an entry with a group, as
    `name[axis]`; elements of parameters and buffers that belong to its groups; why zeroing a group is not the same as
    removing it, None where it is."""

    name: str
    groups: int
    narrowest: int
    elements: int
    tensors: tuple[str, ...]
    not_mask_equivalent: str | None


@dataclass(frozen=True)
class Coverage:
    """prunable_share: of the parameters' elements, those in tensors that have a prunable axis. pinned: parameters
    without one, why, largest first. rewritten: places in the model's code where a slice changes a number."""

    families: tuple[FamilyCoverage, ...]
    prunable_share: float
    pinned: tuple[tuple[str, int, str], ...]
    rewritten: tuple[str, ...]
    on_meta: bool


def coverage(model: nn.Module, analysis: Analysis) -> Coverage:
    """The report on a model that was analysed."""
    groups = analysis.groups
    tensors = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]  # tied ones once
    sizes = groups.sizes(tensors)
    full = groups.widths(np.ones(groups.count, dtype=bool))
    coupled: list[list[str]] = [[] for _ in groups.names]
    for name, axes in {**groups.labels, **groups.unsaved}.items():
        for axis, labels in enumerate(axes):
            for family in np.unique(groups.family[labels[labels != KEPT]]).tolist():
                coupled[family].append(f"{name}[{axis}]")
    families = tuple(
        FamilyCoverage(
            name,
            int(full[number]),
            int(groups.narrowest[number]),
            int(sizes[groups.family == number].sum()),
            tuple(coupled[number]),
            groups.not_mask_equivalent.get(number),
        )
        for number, name in enumerate(groups.names)
    )
    elements = {name: parameter.numel() for name, parameter in model.named_parameters()}
    whole = [name for name in elements if all((axis == KEPT).all() for axis in groups.labels[name])]
    pinned = sorted(((name, elements[name], why(groups.pinned, name)) for name in whole), key=lambda p: (-p[1], p[0]))
    share = 1 - sum(size for _, size, _ in pinned) / max(sum(elements.values()), 1)
    return Coverage(families, share, tuple(pinned), analysis.rewritten, analysis.on_meta)


def why(reasons: Mapping[tuple[str, int], str], name: str) -> str:
    """Why a tensor's first axis that could have lost entries cannot."""
    return next((reason for (tensor, _), reason in reasons.items() if tensor == name), "axes of length 1")
