"""Aggregation rules: what a coordinate of the global checkpoint becomes, given what the clients hold there.

A rule is a pure function on a block, of sums (linear rules) or of every client's own values (robust rules); METHOD.md
section 6 has the mathematics.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.errors import UsageError

Floats = NDArray[np.float64]
TRIM = 0.2
"""Share of the clients at a coordinate that a trimmed mean leaves out at each end, unless said otherwise."""


@dataclass(frozen=True)
class Sums:
    """One block of one tensor, summed over the clients k that hold a coordinate ("cover" it).

    previous: the global checkpoint's values, of the block's shape.
    weighted: sum of n_k * w_k over the covering clients, of the block's shape.
    covering: sum of n_k over the covering clients, by classes of coordinates that the same clients hold.
    missing: sum of n_k over the other clients, exactly 0 where there are none; as `covering`.
    total: sum of n_k over all clients.
    spread: from classes to what broadcasts against the block.
    """

    previous: Floats
    weighted: Floats
    covering: Floats
    missing: Floats
    total: float
    spread: Callable[[Floats], Floats]


@dataclass(frozen=True)
class Rule:
    """A rule has either `of_sums` or `of_values`: each gives the new values where at least one client covers the
    coordinate (elsewhere the previous ones stay).

    of_values: takes float64 (clients, *block), NaN where a client lacks the coordinate. previous_counts: whether the
    previous value has a part in the result where some clients lack the coordinate. by_curvature: whether clients weigh
    by their curvature at a coordinate, beside their number of examples.
    """

    name: str
    of_sums: Callable[[Sums], Floats] | None = None
    of_values: Callable[[Floats], Floats] | None = None
    previous_counts: bool = False
    by_curvature: bool = False


def fill(sums: Sums) -> Floats:
    """Each client is completed with the previous values, then all are averaged:

    w' = (sum_covering n_k w_k + (sum_missing n_k) w) / sum n_k

    Equal to w + sum_covering (n_k / n)(w_k - w), but a coordinate that all clients cover does not feel w at all.
    """
    if not sums.missing.any():
        return np.asarray(sums.weighted / sums.total)
    missing = sums.spread(sums.missing)
    filled = missing * sums.previous
    filled += sums.weighted
    filled /= sums.total
    unfelt = (missing == 0) & (sums.weighted == 0)
    if unfelt.any():  # -0.0 + 0 * w is 0.0, but what all clients hold is not to feel w at all
        filled = np.where(unfelt, sums.weighted, filled)
    return np.asarray(filled)


def covered(sums: Sums) -> Floats:
    """The average over the clients that hold the coordinate: w' = sum_covering n_k w_k / sum_covering n_k."""
    return np.asarray(sums.weighted / sums.spread(np.where(sums.covering > 0, sums.covering, 1.0)))


def trimmed_mean(values: Floats, trim: float) -> Floats:
    """The mean without the lowest and the highest of the m clients that hold a coordinate: floor(trim m) at each end,
    and at least one where m is 3 or more (Yin et al. 2018). Clients count alike: a weight is the client's own claim."""
    ordered = np.sort(values, axis=0)
    holders = np.isfinite(values).sum(axis=0)
    cut = np.maximum(np.floor(trim * holders), holders >= 3)
    number = np.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1))
    kept = (number >= cut) & (number < holders - cut)
    total = np.full(values.shape[1:], -0.0)
    for own in np.where(kept, ordered, -0.0):  # one by one: NumPy's sum has another order for blocks of one number
        total += own
    return np.asarray(total / np.maximum(kept.sum(axis=0), 1))


def median(values: Floats) -> Floats:
    """The middle value of the clients that hold a coordinate, the mean of the middle two of an even number."""
    ordered = np.sort(values, axis=0)
    holders = np.maximum(np.isfinite(values).sum(axis=0), 1)[None]
    low, high = (np.take_along_axis(ordered, place, axis=0)[0] for place in ((holders - 1) // 2, holders // 2))
    return np.asarray(np.where(low == high, low, low + (high - low) / 2))  # keeps -0.0


RULES = {
    "fill": Rule("fill", fill, previous_counts=True),
    "covered": Rule("covered", covered),
    "curvature": Rule("curvature", covered, by_curvature=True),
    "trimmed-mean": Rule("trimmed-mean", of_values=partial(trimmed_mean, trim=TRIM)),
    "median": Rule("median", of_values=median),
}


def rule_named(name: str, trim: float | None = None) -> Rule:
    """Args: trim: what a trimmed mean leaves out at each end, instead of `TRIM`.

    Raises: UsageError: there is no such rule; a `trim` that is not from 0 to below .5, or of another rule.
    """
    if name not in RULES:
        raise UsageError(f"there is no aggregation rule {name!r}; choose one of {', '.join(RULES)}.")
    if trim is None:
        return RULES[name]
    if name != "trimmed-mean":
        raise UsageError(f"--trim belongs to --rule trimmed-mean, not to {name}.")
    if not 0 <= trim < 0.5:
        raise UsageError(f"--trim {trim}: a share from 0 to below 0.5 at each end can be left out.")
    return Rule(name, of_values=partial(trimmed_mean, trim=trim))
