"""Which channel groups a device keeps: the most significant ones, as many as its budget allows.

Every family keeps the same share of its groups, the largest share that fits; what the budget then still allows is
spent group by group, on the most significance a marginal cost. Costs are those of the actual widths.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.device.cost import Cost, CostModel
from cahfp_cli.pruning.budget import Budget, Limits, values_of
from cahfp_cli.pruning.target import Target, Widths, target_of

Mask = NDArray[np.bool_]
SHARE_STEPS = 40


@dataclass(frozen=True)
class Prediction:
    """Divergence of the submodel's predictions from the reference, mean over calibration samples, nats.

    predicted, measured: after the last groups were removed, before the survivors' gates took over, on the samples that
    the prediction was made from. fitted: of the submodel as it is, on all calibration samples, which it was fitted to.
    final: the same on samples held out, which selection did not see; where there are none, on the calibration samples.
    held_out: how many there are. None: not measured.
    """

    predicted: float
    measured: float | None = None
    final: float | None = None
    fitted: float | None = None
    held_out: int = 0


@dataclass(frozen=True)
class Selection:
    """kept: boolean (groups,). cost and full: of the submodel and of the whole network. limits: what had to hold.
    binding: the limit that is closest to being reached, None without one. gates: float64 (groups,), to be folded into
    the weights (see pruning/compensation.py), None without compensation. prediction: None where the loss was not
    looked at. warnings: what is poor about the samples that it was made on, and what to do."""

    kept: Mask
    cost: Cost
    full: Cost
    limits: Limits
    binding: str | None
    gates: NDArray[np.float64] | None = None
    prediction: Prediction | None = None
    warnings: tuple[str, ...] = ()


def select(
    significance: NDArray[np.float64],
    family: Widths,
    model: CostModel,
    budget: Budget,
    narrowest: Widths | None = None,
) -> Selection:
    """Choose the groups to keep.

    Args:
        significance: float64 (groups,), larger is worth more; ties go to the lower group number.
        family: int64 (groups,).
        model: costs as a function of the widths.
        budget: all its limits hold in the result.
        narrowest: int64 (families,), what a family keeps at least; one group without it.
    Raises:
        BudgetError: the narrowest network is already too much; the message has the smallest reachable values.
    """
    target = target_of(budget, model, narrowest)
    widths = grow(significance, family, model, target, uniform(model, target))
    return finished(strongest(significance, family, widths), model, widths, target)


def finished(kept: Mask, model: CostModel, widths: Widths, target: Target) -> Selection:
    """A mask with what it costs."""
    cost = model.cost(widths)
    excess = target.limits.excess(cost)
    binding = max(excess, key=lambda name: excess[name]) if excess else ("keep" if target.narrows(model) else None)
    return Selection(kept, cost, model.full, target.limits, binding)


def uniform(model: CostModel, target: Target) -> Widths:
    """Widths of the largest share, the same in every family, that fits; costs grow with widths, so bisection works."""

    def of(share: float) -> Widths:
        widths: Widths = np.floor(model.full_widths * share + 0.5).astype(np.int64)
        return np.maximum(np.minimum(model.settled(widths), target.most), target.least)

    if target.limits.fit(model.cost(target.most, target.limits.memory)).all():
        return target.most
    low, high = 0.0, 1.0
    for _ in range(SHARE_STEPS):
        middle = (low + high) / 2
        if target.limits.fit(model.cost(of(middle), target.limits.memory)).all():
            low = middle
        else:
            high = middle
    return of(low)


def grow(
    significance: NDArray[np.float64],
    family: Widths,
    model: CostModel,
    target: Target,
    widths: Widths,
) -> Widths:
    """Spend what is left of the budget: again and again the best affordable next group, by significance a cost, or as
    many groups as fast kernels want at once."""
    ranked = by_family(significance, family, len(widths))
    widths, limits = widths.copy(), target.limits.by_name
    while (growing := np.flatnonzero(widths < target.most)).size:
        candidates = np.repeat(widths[None], len(growing), axis=0)
        candidates[np.arange(len(growing)), growing] += 1
        candidates = np.minimum(model.settled(candidates), target.most)
        cost = model.cost(candidates, target.limits.memory)
        fits = target.limits.fit(cost)
        if not fits.any():
            break
        now = model.cost(widths, target.limits.memory)
        increase = sum((values_of(cost, name) - values_of(now, name)) / limit for name, limit in limits.items())
        more = candidates[np.arange(len(growing)), growing]
        worth = np.array([significance[ranked[f][widths[f] : end]].sum() for f, end in zip(growing, more, strict=True)])
        gain = worth / np.maximum(increase, 1e-12)
        widths = candidates[int(np.argmax(np.where(fits, gain, -np.inf)))]
    return widths


def by_family(significance: NDArray[np.float64], family: Widths, families: int) -> list[NDArray[np.int64]]:
    """Group numbers of each family, the most significant first."""
    order = np.argsort(-significance, kind="stable")
    return [order[family[order] == f] for f in range(families)]


def strongest(significance: NDArray[np.float64], family: Widths, widths: Widths) -> Mask:
    """The mask that keeps the `widths[f]` most significant groups of each family f."""
    kept = np.zeros(len(significance), dtype=bool)
    for members, width in zip(by_family(significance, family, len(widths)), widths, strict=True):
        kept[members[:width]] = True
    return kept
