"""What selection aims at: a budget in absolute numbers, and how narrow and wide each family may become."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import ceil

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.coupling.groups import ChannelGroups
from cahfp_cli.device.cost import CostModel
from cahfp_cli.errors import BudgetError, UsageError
from cahfp_cli.pruning.budget import Budget, Limits, limits_of, shown, values_of

Widths = NDArray[np.int64]


@dataclass(frozen=True)
class Target:
    """What must hold: `limits` of the cost, and no family wider than `most`, int64 (families,), or narrower than
    `least`."""

    limits: Limits
    least: Widths
    most: Widths

    def narrows(self, model: CostModel) -> bool:
        """Whether some family must lose groups whatever they cost."""
        return bool((self.most < model.full_widths).any())


def target_of(budget: Budget, model: CostModel, narrowest: Widths | None = None) -> Target:
    """The target that a budget means for a network.

    Args: narrowest: int64 (families,), what a family keeps at least; one group without it.
    Raises: BudgetError: the narrowest network is already too much; the message has the smallest reachable values.
    """
    limits = limits_of(budget, model.full)
    least = np.minimum(model.full_widths, 1 if narrowest is None else narrowest)
    if "latency" in limits.by_name:
        least = quickest(model, least)
    check_reachable(model, limits, least)
    rounded = np.floor(model.full_widths * (budget.keep or 1.0) + 0.5).astype(np.int64)
    return Target(limits, least, np.maximum(rounded, least))


def protected(groups: ChannelGroups, excluded: Sequence[str], least: int) -> ChannelGroups:
    """The groups with families that may not become narrower than `least`, and those of `excluded` not at all.

    Args: excluded: patterns of family names, such as `layer1.*`; least: groups.
    Raises: UsageError: a pattern names no family.
    """
    full = np.bincount(groups.family, minlength=len(groups.names))
    narrowest = np.minimum(np.maximum(groups.narrowest, least), full)
    for pattern in excluded:
        named = np.array([fnmatchcase(name, pattern) for name in groups.names], dtype=bool)
        if not named.any():
            nearest = get_close_matches(pattern, groups.names, n=1, cutoff=0.3)
            hint = f"did you mean '{nearest[0]}'?" if nearest else "there are none."
            raise UsageError(f"--exclude {pattern}: no layer's groups have that name: {hint}")
        narrowest[named] = full[named]
    return replace(groups, narrowest=narrowest)


def quickest(model: CostModel, least: Widths) -> Widths:
    """The widths below which families only get slower: kernels for fewer channels than a block may take longer than
    those of a whole one. Families are looked at one by one, twice; without such kernels, `least`.

    Args: least: int64 (families,), what each family keeps at least.
    """
    if model.hard == 1:
        return least
    widths = model.settled(least)
    for number in 2 * list(range(len(widths))):
        block = min(model.alignment, int(model.full_widths[number]))
        choices = np.unique([*range(int(model.settled(least)[number]), block, model.hard), widths[number], block])
        choices = choices[choices >= least[number]]
        candidates = np.repeat(widths[None], len(choices), axis=0)
        candidates[:, number] = choices
        seconds = values_of(model.cost(candidates, memory=False), "latency")
        widths[number] = choices[int(np.argmin(seconds))]
    return widths


def check_reachable(model: CostModel, limits: Limits, least: Widths) -> None:
    """Raise BudgetError, with the smallest reachable value of each limit, unless the narrowest network or all fits."""
    narrowest = model.cost(model.settled(least))  # what selection goes by
    if limits.fit(model.full).all():
        return
    broken = [name for name, limit in limits.by_name.items() if values_of(narrowest, name) > limit]
    if broken:
        parts = [
            f"{name} {shown(name, limits.by_name[name])} (smallest reachable: "
            f"{shown_up(name, float(values_of(narrowest, name)))})"
            for name in broken
        ]
        raise BudgetError(
            f"the budget cannot be met even with the fewest channels a layer: {', '.join(parts)}.\n"
            "Raise the budget, or start from a smaller network."
        )


def shown_up(name: str, value: float) -> str:
    """As `shown`, rounded so that the text is never below the value: it can be passed back as a budget."""
    if name in ("memory", "storage"):
        return f"{ceil(value / 1e3)} KB"
    if name == "latency":
        return f"{ceil(value * 1e7) / 10:.1f} us" if value < 1e-3 else f"{ceil(value * 1e5) / 100:.2f} ms"
    return str(ceil(value))
