"""Greedy removal: block after block, the one that costs least loss for what it saves, until all limits hold.

A block is one group of a family, or as many as it takes to reach a width where the device saves something: kernels that
compute several channels together cost the same up to the next step.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cahfp_cli.device.cost import CostModel
from cahfp_cli.errors import BudgetError
from cahfp_cli.pruning.budget import Limits, values_of
from cahfp_cli.pruning.linearised import Removal
from cahfp_cli.pruning.target import Target, Widths

Floats = NDArray[np.float64]

SHORTLIST = 3
"""Single groups of each family, those with the least estimates, that are looked at exactly."""
AT_ONCE = 1000
"""A step removes one of so many groups, or one block: large networks take as many steps as small ones."""


@dataclass(frozen=True)
class Narrowing:
    """Fewer groups for one family. saving: of the exceeded costs, each as a share of its limit; positive."""

    family: int
    groups: int
    saving: float


def remove_to_fit(removal: Removal, family: Widths, cost: CostModel, widths: Widths, target: Target) -> Widths:
    """Remove groups until the target is met, then put back what still fits.

    Args:
        removal: nothing removed yet; changed in place.
        family: int64 (groups,), of its groups.
        widths: int64 (families,), those of its network. The target can be met from there.
    Returns: the widths that are left.
    Raises: BudgetError: the narrowest network does not meet it: it is slower than a wider one that is not allowed.
    """
    widths = widths.copy()
    members = torch.from_numpy(family).to(removal.alive.device)
    removed: list[int] = []
    while True:
        over = exceeded(cost, widths, target.limits)
        wide = widths > target.most
        if not over and not wide.any():
            widths = restore(removal, family, cost, widths, target, removed)
            return settle(removal, family, cost, widths, target, removed)
        if over and (widths <= target.least).all():
            raise BudgetError(
                f"no network of these widths meets the budget for {', '.join(over)}; raise it, or --keep."
            )
        ways = (
            narrowings(cost, widths, target, over)
            if over
            else [Narrowing(int(f), 1, 1.0) for f in np.flatnonzero(wide)]
        )
        blocks, saving = blocks_of(removal, members, ways)
        ratio = removal.together(blocks).cpu().double().numpy() / saving
        count = max(1, int(removal.alive.sum()) // AT_ONCE)
        for position in np.argsort(ratio, kind="stable")[:count]:
            block = blocks[position]
            number = int(family[block[0]])
            if not removal.alive[block].all() or widths[number] - len(block) < target.least[number]:
                continue  # what went before in this step was of the same family
            for group in block.tolist():
                removal.remove(group)
                removed.append(group)
            widths[number] -= len(block)


def exceeded(cost: CostModel, widths: Widths, limits: Limits) -> list[str]:
    """The names of the limits that do not hold once the widths are settled."""
    return [
        name
        for name, excess in limits.excess(cost.cost(cost.settled(widths), memory=limits.memory)).items()
        if excess > 1.0
    ]


def narrowings(cost: CostModel, widths: Widths, target: Target, over: list[str]) -> list[Narrowing]:
    """For each family the next narrower width that fast kernels take, and the next step of the device's alignment,
    where that saves some of the exceeded costs; by one group each if nothing saves anything."""
    families = np.flatnonzero(widths > target.least)
    floor = {step: np.maximum((widths - 1) // step * step, target.least) for step in (cost.hard, cost.alignment)}
    ways = sorted({(int(f), int(widths[f] - narrower[f])) for narrower in floor.values() for f in families})
    candidates = np.repeat(widths[None], len(ways), axis=0)
    for row, (number, groups) in zip(candidates, ways, strict=True):
        row[number] -= groups
    memory = "memory" in over
    now, then = cost.cost(cost.settled(widths), memory), cost.cost(cost.settled(candidates), memory)
    saved = sum((values_of(now, name) - values_of(then, name)) / target.limits.by_name[name] for name in over)
    found = [Narrowing(*way, float(s)) for way, s in zip(ways, np.atleast_1d(saved), strict=True) if s > 0]
    return found or [Narrowing(int(number), 1, 1.0) for number in families]


def blocks_of(removal: Removal, members: torch.Tensor, ways: list[Narrowing]) -> tuple[list[torch.Tensor], Floats]:
    """The groups that may go, int64 each, by least estimates, and what each block saves; of single groups several.

    Args: members: int64 (groups,), the family of each.
    """
    estimate = removal.estimate()
    blocks, saving = [], []
    for way in ways:
        own = torch.nonzero((members == way.family) & removal.alive)[:, 0]
        count = min(SHORTLIST, len(own)) if way.groups == 1 else way.groups
        least = own[estimate[own].topk(count, largest=False).indices]
        found = list(least[:, None]) if way.groups == 1 else [least]
        blocks += found
        saving += [way.saving] * len(found)
    return blocks, np.array(saving)


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
