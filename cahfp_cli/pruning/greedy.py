"""Greedy removal: group after group, the one that costs least loss for what it saves, until all limits hold."""

import numpy as np
import torch
from numpy.typing import NDArray

from cahfp_cli.device.cost import CostModel
from cahfp_cli.pruning.budget import Limits, values_of
from cahfp_cli.pruning.linearised import Removal
from cahfp_cli.pruning.target import Target, Widths

Floats = NDArray[np.float64]

SHORTLIST = 3
"""Groups of each family, those with the least estimates, that are looked at exactly."""
AT_ONCE = 1000
"""A step removes one of so many groups, or one: large networks take as many steps as small ones."""


def remove_to_fit(removal: Removal, family: Widths, cost: CostModel, widths: Widths, target: Target) -> Widths:
    """Remove groups until the target is met, then put back what still fits.

    Args:
        removal: nothing removed yet; changed in place.
        family: int64 (groups,), of its groups.
        widths: int64 (families,), those of its network. The target can be met from there.
    Returns: the widths that are left.
    """
    widths = widths.copy()
    members = torch.from_numpy(family)
    removed: list[int] = []
    while True:
        over = exceeded(cost, widths, target.limits)
        wide = widths > target.most
        if not over and not wide.any():
            widths = restore(removal, family, cost, widths, target, removed)
            return settle(removal, family, cost, widths, target, removed)
        open_families = np.flatnonzero((widths > target.least) & (wide if not over else True))
        saving = savings(cost, widths, target, over, open_families) if over else np.ones(len(widths))
        candidates = shortlist(removal, members, open_families)
        loss = removal.exact(candidates).cpu().double().numpy()
        ratio = loss / np.maximum(saving[family[candidates.cpu().numpy()]], 1e-12)
        for position in np.argsort(ratio, kind="stable")[: max(1, int(removal.alive.sum()) // AT_ONCE)]:
            group = int(candidates[position])
            if widths[family[group]] > target.least[family[group]]:
                removal.remove(group)
                removed.append(group)
                widths[family[group]] -= 1


def exceeded(cost: CostModel, widths: Widths, limits: Limits) -> list[str]:
    """The names of the limits that do not hold once the widths are settled."""
    return [
        name
        for name, excess in limits.excess(cost.cost(cost.settled(widths), memory=limits.memory)).items()
        if excess > 1.0
    ]


def savings(cost: CostModel, widths: Widths, target: Target, over: list[str], families: Widths) -> Floats:
    """What one group less of each family saves of the exceeded costs, each as a share of its limit; float64
    (families,), 0 for those not asked for.

    It is taken over a whole step of the device's channel alignment: inside a step nothing seems to be saved.
    """
    step = np.minimum(cost.alignment, widths[families] - target.least[families])
    candidates = np.repeat(widths[None], len(families), axis=0)
    candidates[np.arange(len(families)), families] -= step
    memory = "memory" in over
    now, then = cost.cost(widths, memory), cost.cost(candidates, memory)
    saved = sum((values_of(now, name) - values_of(then, name)) / target.limits.by_name[name] for name in over)
    result = np.zeros(len(widths))
    result[families] = saved / step
    return result


def shortlist(removal: Removal, members: torch.Tensor, families: Widths) -> torch.Tensor:
    """The groups of each family with the least estimates, int64 (k,)."""
    estimate = removal.estimate()
    chosen = []
    for number in families.tolist():
        own = torch.nonzero((members == number).to(removal.alive.device) & removal.alive)[:, 0]
        chosen.append(own[estimate[own].topk(min(SHORTLIST, len(own)), largest=False).indices])
    return torch.cat(chosen)


def restore(
    removal: Removal, family: Widths, cost: CostModel, widths: Widths, target: Target, removed: list[int]
) -> Widths:
    """Put removed groups back, the last removed first, where every limit still holds: what a device computes in steps
    of several channels costs nothing up to the next step."""
    for group in reversed(removed):
        wider = widths.copy()
        wider[family[group]] += 1
        if wider[family[group]] <= target.most[family[group]] and not exceeded(cost, wider, target.limits):
            removal.restore(group)
            widths = wider
    return widths


def settle(
    removal: Removal, family: Widths, cost: CostModel, widths: Widths, target: Target, removed: list[int]
) -> Widths:
    """Widths that fast kernels take: removed groups come back up to the next such width, which the limits have room
    for; a family of which too few were removed loses more instead, if it may."""
    widths, up = widths.copy(), np.minimum(cost.settled(widths), target.most)
    members = torch.from_numpy(family).to(removal.alive.device)
    for number in np.flatnonzero(cost.settled(widths) != widths):
        gone = [group for group in reversed(removed) if family[group] == number and not removal.alive[group]]
        missing = int(up[number] - widths[number])
        if len(gone) >= missing and cost.settled(up)[number] == up[number]:
            for group in gone[:missing]:
                removal.restore(group)
            widths[number] = up[number]
            continue
        down = int(widths[number]) // cost.hard * cost.hard
        while widths[number] > max(down, target.least[number]) and down >= target.least[number]:
            alive = torch.nonzero((members == int(number)) & removal.alive)[:, 0]
            removal.remove(int(alive[removal.estimate()[alive].argmin()]))
            widths[number] -= 1
    return widths
