"""From a network and calibration data to one number a channel group."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from cahfp_cli.coupling.groups import ChannelGroups
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.errors import InputError
from cahfp_cli.models.checkpoint_io import state_arrays
from cahfp_cli.significance.registry import Criterion, Evidence
from cahfp_cli.significance.statistics import Floats, GateStatistics, gate_statistics


@dataclass(frozen=True)
class Measured:
    """significance: float64 (groups,). gates: None for a criterion that needs none."""

    significance: Floats
    gates: GateStatistics | None


def subset(dataset: Dataset, samples: int, seed: int) -> Dataset:
    """A random subset without repetition, in the data's order; all of it if there are fewer."""
    if samples >= len(dataset):
        return dataset
    chosen = np.sort(np.random.default_rng(seed).choice(len(dataset), samples, replace=False))
    return Dataset(dataset.x[chosen], dataset.y[chosen], dataset.classes, dataset.name)


def measure(
    model: nn.Module,
    groups: ChannelGroups,
    criterion: Criterion,
    calibration: Dataset | None,
    batch_size: int,
    top: int | None,
    draws: int | None,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> Measured:
    """Apply a criterion.

    Args:
        model: on the device to compute on.
        calibration: needed by criteria that look at data.
    Raises: InputError: a score is not finite, or gates cannot be measured.
    """
    gates = None
    if criterion.needs != "weights" and calibration is None:
        raise ValueError(f"{criterion.name} needs calibration data")
    if criterion.needs == "gates" and calibration is not None:
        gates = gate_statistics(
            model,
            groups,
            calibration.x,
            calibration.y,
            batch_size=batch_size,
            top=top,
            draws=draws,
            seed=seed,
            on_progress=on_progress,
        )
    significance = criterion.function(Evidence(model.eval(), groups, state_arrays(model), calibration, gates, seed))
    if not np.isfinite(significance).all():
        raise InputError(f"{criterion.name} gives NaN or Inf for {int((~np.isfinite(significance)).sum())} groups")
    return Measured(significance, gates)
