"""From a network and calibration data to one number a channel group."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.coupling.groups import ChannelGroups
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.errors import InputError
from cahfp_cli.models.tensors import state_arrays
from cahfp_cli.models.undisturbed import undisturbed
from cahfp_cli.significance.registry import SHRINK, Criterion, Evidence
from cahfp_cli.significance.statistics import Floats, GateStatistics, gate_statistics


@dataclass(frozen=True)
class Measuring:
    """How to measure: see `statistics.gate_statistics`, and for `shrink` `registry.Evidence`."""

    batch_size: int = 64
    top: int | None = None
    draws: int | None = None
    interactions: bool = True
    seed: int = 0
    shrink: float = SHRINK


@dataclass(frozen=True)
class Measured:
    """significance: float64 (groups,). gates: None for a criterion that needs none."""

    significance: Floats
    gates: GateStatistics | None


def subset(dataset: Dataset, samples: int, seed: int) -> Dataset:
    """A random subset without repetition, in the data's order; all of it if there are fewer."""
    return split(dataset, samples, 0, seed)[0]


def split(dataset: Dataset, samples: int, others: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """A random subset without repetition, in the data's order, and up to `others` of the rest; None if there are none.
    The first does not depend on `others`."""
    if samples >= len(dataset):
        return dataset, None
    chosen = np.sort(np.random.default_rng(seed).choice(len(dataset), samples, replace=False))
    rest = np.setdiff1d(np.arange(len(dataset)), chosen)
    further = np.sort(np.random.default_rng((seed, 1)).choice(rest, min(others, len(rest)), replace=False))
    return take(dataset, chosen), take(dataset, further) if len(further) else None


def hold_out(dataset: Dataset, samples: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Up to `samples` to fit, and a quarter as many others to judge by; where the set is too small for both, a fifth of
    it is held out. None where it has fewer than five."""
    fitted = min(samples, len(dataset) - len(dataset) // 5)
    return split(dataset, fitted, min(-(-samples // 4), len(dataset) - fitted), seed)


def take(dataset: Dataset, rows: NDArray[np.int64]) -> Dataset:
    """Some samples of a set."""
    return Dataset(dataset.x[rows], dataset.y[rows], dataset.classes, dataset.name)


def measure(
    model: nn.Module,
    groups: ChannelGroups,
    criterion: Criterion,
    calibration: Dataset | None,
    how: Measuring,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Apply a criterion.

    Args:
        model: on the device to compute on; left as it was.
        calibration: needed by criteria that look at data.
    Raises: InputError: a score is not finite, or gates cannot be measured.
    """
    if criterion.needs != "weights" and calibration is None:
        raise ValueError(f"{criterion.name} needs calibration data")
    with undisturbed(model):
        return measured(model, groups, criterion, calibration, how, on_progress)


def measured(
    model: nn.Module,
    groups: ChannelGroups,
    criterion: Criterion,
    calibration: Dataset | None,
    how: Measuring,
    on_progress: Callable[[int, int], None],
) -> Measured:
    """As `measure`, on a network that may be changed by it."""
    gates = None
    if criterion.needs == "gates" and calibration is not None:
        gates = gate_statistics(
            model,
            groups,
            calibration.x,
            calibration.y,
            batch_size=how.batch_size,
            top=how.top,
            draws=how.draws,
            interactions=how.interactions,
            seed=how.seed,
            on_progress=on_progress,
        )
    evidence = Evidence(model.eval(), groups, state_arrays(model), calibration, gates, how.seed, how.shrink)
    significance = criterion.function(evidence)
    if not np.isfinite(significance).all():
        raise InputError(f"{criterion.name} gives NaN or Inf for {int((~np.isfinite(significance)).sum())} groups")
    return Measured(significance, gates)
