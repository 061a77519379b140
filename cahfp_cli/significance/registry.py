"""The registry of criteria: what was measured becomes one number a channel group, larger is worth more."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.coupling.groups import ChannelGroups
from cahfp_cli.errors import UsageError
from cahfp_cli.significance.gates import Floats, GateStatistics


@dataclass(frozen=True)
class Evidence:
    """What criteria may look at.

    groups: the channel groups; weights: every tensor of the checkpoint by name; gates: None for a criterion that
    needs no data; seed: for criteria that draw.
    """

    groups: ChannelGroups
    weights: Mapping[str, NDArray[Any]]
    gates: GateStatistics | None
    seed: int


@dataclass(frozen=True)
class Criterion:
    """A named function of the evidence; `needs_gates` says whether calibration data must be run."""

    name: str
    needs_gates: bool
    function: Callable[[Evidence], Floats]


CRITERIA: dict[str, Criterion] = {}


def criterion(
    name: str, *, needs_gates: bool
) -> Callable[[Callable[[Evidence], Floats]], Callable[[Evidence], Floats]]:
    """Register a criterion under its name on the command line."""

    def register(function: Callable[[Evidence], Floats]) -> Callable[[Evidence], Floats]:
        CRITERIA[name] = Criterion(name, needs_gates, function)
        return function

    return register


def find_criterion(name: str) -> Criterion:
    """The criterion of that name. Raises UsageError with the names there are."""
    from cahfp_cli.significance import criteria

    assert criteria.__all__  # importing the package fills the registry
    if name not in CRITERIA:
        raise UsageError(f"there is no criterion {name!r}: choose one of {', '.join(sorted(CRITERIA))}")
    return CRITERIA[name]


def gates_of(evidence: Evidence) -> GateStatistics:
    """The gate statistics that a criterion asked for."""
    if evidence.gates is None:
        raise ValueError("this criterion needs gate statistics")
    return evidence.gates


def group_sums(evidence: Evidence, of: Callable[[NDArray[Any]], NDArray[Any]]) -> Floats:
    """Sum of `of(weight)` over each group's weights (matrices and kernels, not vectors), float64 (groups,).

    An element that belongs to two groups, by its input and by its output, counts for both.
    """
    total = np.zeros(evidence.groups.count + 1)
    for name, axes in evidence.groups.labels.items():
        if len(axes) < 2:
            continue
        values = of(np.asarray(evidence.weights[name], dtype=np.float64))
        for axis, labels in enumerate(axes):
            if (labels >= 0).any():
                others = tuple(i for i in range(values.ndim) if i != axis)
                np.add.at(total, labels, values.sum(axis=others))
    return total[:-1]
