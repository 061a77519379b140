"""Masks chosen by scores: how wide each layer of a device's submodel is, and which groups it keeps.

All masks are renewed together, every few rounds, so that devices alike whose scores are alike train the same submodel.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from cahfp_cli.coupling.groups import ChannelGroups
from cahfp_cli.device.cost import CostModel
from cahfp_cli.federation.devices import Device
from cahfp_cli.federation.memory import Floats, Mask, Memory, limited
from cahfp_cli.pruning.budget import Budget
from cahfp_cli.pruning.selection import by_family, grow, select, strongest
from cahfp_cli.pruning.target import Widths, target_of

Sized = Callable[[Floats, ChannelGroups, CostModel, Budget], Mask]
"""Called with significance, groups, and what a device's widths cost and may cost."""


def level(groups: ChannelGroups) -> Floats:
    """What groups are worth before anybody has scored: every family the same, its groups alike; float64 (groups,)."""
    return np.asarray(1.0 / np.bincount(groups.family)[groups.family])


def diminishing(significance: Floats, family: Widths) -> Floats:
    """What the groups are worth one after the other, float64 (groups,): the j-th best of a family adds S / j, with S
    the family's significance in all.

    Scores are of single groups, each with all others there. Summed up they say that the groups of a family which stand
    in for one another are worth little together, and the family would be pruned away. So the family's sum decides how
    it does against others, and what a further group adds falls as in a logarithm of the width.
    """
    worth = np.zeros(len(significance))
    for members in by_family(significance, family, int(family.max()) + 1):
        worth[members] = significance[members].sum() / np.arange(1, len(members) + 1)
    return worth


def layered(significance: Floats, groups: ChannelGroups, cost: CostModel, budget: Budget) -> Mask:
    """The mask that fits a budget, with the width of each layer by what it is worth and costs, boolean (groups,)."""
    target = target_of(budget, cost, groups.narrowest)
    narrow = np.minimum(cost.settled(target.least), target.most)
    widths = grow(diminishing(significance, groups.family), groups.family, cost, target, narrow)
    return strongest(significance, groups.family, widths)


def even(significance: Floats, groups: ChannelGroups, cost: CostModel, budget: Budget) -> Mask:
    """The mask that fits a budget, with about the same share of each layer, boolean (groups,)."""
    return select(significance, groups.family, cost, budget, groups.narrowest).kept


SIZED: dict[str, Sized] = {"even": even, "layered": layered}


def renewed(
    memory: Memory, devices: tuple[Device, ...], groups: ChannelGroups, mix: float, churn: float, choose: Sized
) -> Memory:
    """The memory with masks chosen anew from its scores, of all clients.

    Args: mix: see `Memory.significance`. churn: share of a layer's kept groups that a new mask may exchange. choose:
        `layered` or `even`.
    """
    masks = memory.masks.copy()
    known: dict[tuple[int, bytes], Mask] = {}
    for client, device in enumerate(devices):
        significance, old = memory.significance(client, mix), memory.masks[client]
        if significance is None:
            return memory
        key = (id(device), significance.tobytes())
        if key not in known:
            known[key] = choose(significance, groups, device.cost, device.budget)
        masks[client] = limited(old, known[key], significance, groups.family, churn)
    return replace(memory, masks=masks)


def nested(own: Mask, other: Mask, significance: Floats, family: Widths) -> Mask:
    """The part of `own` that has at most the widths of `other`: first the groups that both have, then the most
    significant; all (groups,)."""
    rank = np.where(own, significance + other * (1 + significance.max()), -1.0)
    count = int(family.max()) + 1
    widths = np.minimum(np.bincount(family[own], minlength=count), np.bincount(family[other], minlength=count))
    return strongest(rank, family, widths)
