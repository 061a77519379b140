"""Nothing of a client's reply is averaged before it has been looked at."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cahfp_cli.checkpoint.dtypes import Array, dtype_code
from cahfp_cli.coupling.groups import ChannelGroups
from cahfp_cli.federation.client import Reply
from cahfp_cli.federation.devices import Device
from cahfp_cli.federation.memory import Floats, Mask
from cahfp_cli.formats.index_map import IndexMap
from cahfp_cli.pruning.target import target_of

MOST_EXAMPLES = 10**9
"""No device has more samples; a client that says so wants to be all of the average."""
MOST_LOSS = 1e6
"""A mean loss in nats that no training which went well has."""
MOST_SIGNIFICANCE = 1e3
"""Scores beyond so many times the median say nothing more, and would rule the moving average."""


def fault_of(reply: Reply, index_map: IndexMap) -> str | None:
    """Why a reply must not be merged, judged by the server's own index map; None for one that may be. The numbers in
    its tensors are left to the gate of `reconstruct`."""
    examples: Any = reply.num_examples  # whatever a client sent
    if isinstance(examples, bool) or not isinstance(examples, int | np.integer):
        return "num_examples is not a whole number"
    if not 1 <= reply.num_examples <= MOST_EXAMPLES:
        return f"num_examples is {reply.num_examples}, not within 1 and {MOST_EXAMPLES}"
    loss: Any = reply.loss
    if not isinstance(loss, float | np.floating) or not 0 <= loss <= MOST_LOSS:
        return f"its loss is not within 0 and {MOST_LOSS:.0f}"
    if reply.arrays.keys() != index_map.tensors.keys():
        return f"its tensors are not those it was sent: {sorted(reply.arrays.keys() ^ index_map.tensors.keys())[0]!r}"
    return next(filter(None, (_fault_of_tensor(name, reply.arrays, index_map) for name in index_map.tensors)), None)


def _fault_of_tensor(name: str, arrays: Mapping[str, Array], index_map: IndexMap) -> str | None:
    array: Any = arrays[name]  # whatever a client sent
    entry = index_map.tensors[name]
    if not isinstance(array, np.ndarray):
        return f"{name!r} is not an array"
    if array.shape != entry.submodel_shape:
        return f"{name!r} has shape {list(array.shape)}, not {list(entry.submodel_shape)}"
    try:
        code = dtype_code(array.dtype)
    except ValueError:
        code = str(array.dtype)
    if code != entry.dtype:
        return f"{name!r} is {code}, not {entry.dtype}"
    return None


def checked_scores(significance: Floats, groups: int) -> Floats | None:
    """Scores that may enter the server's memory, clipped from above; None where they are unsound.

    Args: significance: as the client sent it, which should be (groups,), finite and >= 0.
    """
    if significance.shape != (groups,) or not np.isfinite(significance).all() or (significance < 0).any():
        return None
    middle = float(np.median(significance))
    return np.minimum(significance, MOST_SIGNIFICANCE * middle) if middle > 0 else significance


def fault_of_mask(mask: Mask, groups: ChannelGroups, device: Device, *, even: bool) -> str | None:
    """Why a mask that a client chose is not one that its device may have; None for a sound one.

    Args: even: whether it must have the share of every layer that the device can hold, or only something of each.
    """
    if mask.shape != (groups.count,) or mask.dtype != np.bool_:
        return f"its mask is {mask.dtype} {list(mask.shape)}, not one bit for each of {groups.count} groups"
    widths, target = groups.widths(mask), target_of(device.budget, device.cost, groups.narrowest)
    least = device.widths if even else target.least
    if (widths < least).any() or (widths > target.most).any():
        return "its mask has a layer that is narrower or wider than its device may have"
    if not target.limits.fit(device.cost.cost(widths)).all():
        return "its mask is larger than its device's budget"
    return None
