"""Aggregation rules: what a coordinate of the global checkpoint becomes, given what the clients hold there.

A rule is a pure function on a block of float64 sums; METHOD.md section 6 has the mathematics.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.errors import UsageError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sums:
    """One block of one tensor, summed over the clients k that hold a coordinate ("cover" it).

    previous: the global checkpoint's values, of the block's shape.
    weighted: sum of n_k * w_k over the covering clients, of the block's shape.
    covering: sum of n_k over the covering clients; of the block's shape, or broadcastable to it.
    missing: sum of n_k over the other clients, exactly 0 where there are none; as `covering`.
    total: sum of n_k over all clients.
    """

    previous: Floats
    weighted: Floats
    covering: Floats
    missing: Floats
    total: float


@dataclass(frozen=True)
class Rule:
    """`merge` gives the new values where at least one client covers the coordinate (elsewhere the previous ones stay).

    previous_counts: whether the previous value has a part in the result where some clients lack the coordinate.
    """

    name: str
    merge: Callable[[Sums], Floats]
    previous_counts: bool


def fill(sums: Sums) -> Floats:
    """Each client is completed with the previous values, then all are averaged:

    w' = (sum_covering n_k w_k + (sum_missing n_k) w) / sum n_k

    Equal to w + sum_covering (n_k / n)(w_k - w), but a coordinate that all clients cover does not feel w at all.
    """
    # -0.0 is what leaves every number as it is when added, also -0.0; and 0 * w could be NaN.
    return np.asarray((sums.weighted + np.where(sums.missing > 0, sums.missing * sums.previous, -0.0)) / sums.total)


def covered(sums: Sums) -> Floats:
    """The average over the clients that hold the coordinate: w' = sum_covering n_k w_k / sum_covering n_k."""
    return np.asarray(sums.weighted / np.where(sums.covering > 0, sums.covering, 1.0))


RULES = {
    "fill": Rule("fill", fill, previous_counts=True),
    "covered": Rule("covered", covered, previous_counts=False),
}


def rule_named(name: str) -> Rule:
    """Raises: UsageError: there is no such rule."""
    if name not in RULES:
        raise UsageError(f"there is no aggregation rule {name!r}; choose one of {', '.join(RULES)}.")
    return RULES[name]
