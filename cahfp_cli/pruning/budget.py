"""Budgets: what a submodel must fit, in absolute numbers once the full network's cost is known."""

from dataclasses import dataclass, fields

import numpy as np

from cahfp_cli.device.cost import Cost
from cahfp_cli.device.profile import DefaultBudget
from cahfp_cli.device.quantities import Limit, Share, format_bytes, format_count, format_seconds


@dataclass(frozen=True)
class Budget:
    """Upper limits, None where there is none.

    latency: seconds; memory, storage: bytes; macs, params: a share of the full network's or a count; keep: share of
    every family's channel groups.
    """

    latency: float | None = None
    memory: int | None = None
    storage: int | None = None
    macs: Limit | None = None
    params: Limit | None = None
    keep: float | None = None

    def __bool__(self) -> bool:
        """Whether it limits anything."""
        return any(getattr(self, field.name) is not None for field in fields(self))


def budget_of_profile(default: DefaultBudget) -> Budget:
    """A profile's own budget."""
    return Budget(default.latency, default.memory, default.storage, default.macs, default.params, default.keep)


@dataclass(frozen=True)
class Limits:
    """A budget in absolute numbers, by the name of the cost that each limits; `keep` is applied to widths instead."""

    by_name: dict[str, float]

    @property
    def memory(self) -> bool:
        """Whether memory is limited, which takes long to predict."""
        return "memory" in self.by_name

    def excess(self, cost: Cost) -> dict[str, float]:
        """Each cost as a multiple of its limit; a candidate fits if none is above 1. For one candidate."""
        return {name: float(values_of(cost, name)) / limit for name, limit in self.by_name.items()}

    def fit(self, cost: Cost) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Which candidates of a batch fit, boolean of the batch's shape."""
        fits = np.ones(np.shape(cost.macs), dtype=bool)
        for name, limit in self.by_name.items():
            fits &= values_of(cost, name) <= limit
        return fits


def limits_of(budget: Budget, full: Cost) -> Limits:
    """Absolute limits of a budget for a network whose unpruned cost is `full`."""

    def absolute(limit: Limit, whole: float) -> float:
        return limit.value * whole if isinstance(limit, Share) else float(limit.value)

    limits: dict[str, float] = {}
    if budget.latency is not None:
        limits["latency"] = budget.latency
    if budget.memory is not None:
        limits["memory"] = float(budget.memory)
    if budget.storage is not None:
        limits["storage"] = float(budget.storage)
    if budget.macs is not None:
        limits["macs"] = absolute(budget.macs, float(full.macs))
    if budget.params is not None:
        limits["params"] = absolute(budget.params, float(full.params))
    return Limits(limits)


def values_of(cost: Cost, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The cost that a budget of that name limits."""
    if name == "latency":
        if cost.slow_seconds is None:
            raise ValueError("a latency budget needs a device profile")
        return cost.slow_seconds
    return {
        "memory": cost.memory_bytes,
        "storage": cost.storage_bytes,
        "macs": cost.macs,
        "params": cost.params,
    }[name]


def shown(name: str, value: float) -> str:
    """A cost for people: `5 ms`, `64 MB`, `11.2M`."""
    formats = {"latency": format_seconds, "memory": format_bytes, "storage": format_bytes}
    return formats.get(name, format_count)(value)
