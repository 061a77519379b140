"""What all devices' submodels of a network have in common: the network, how to prune, its structure, samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import JsonValue

from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.coupling.analysis import Analysis
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.device.profile import DeviceProfile
from cahfp_cli.device.workload import unmodelled_operators
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.export.onnx_file import ExportOptions
from cahfp_cli.library.network import Network, analysed, check_data, first_samples, warn
from cahfp_cli.library.score import named
from cahfp_cli.models.tensors import check_can_be_saved, to_array
from cahfp_cli.provenance import given, portable
from cahfp_cli.pruning.budget import Budget
from cahfp_cli.pruning.set_selection import Reference
from cahfp_cli.pruning.target import protected
from cahfp_cli.significance.measure import hold_out, subset
from cahfp_cli.significance.scores import Scores

SelectionName = Literal["linear", "quadratic", "independent"]


@dataclass(frozen=True)
class Pruning:
    """How to prune.

    selection: as a set on calibration samples, by a `linear` or `quadratic` model of the outputs, or `independent`,
    each group by its own score; None: linear where there are calibration samples, else independent.
    samples: of the calibration data, at most. rounds, compensate, reference, batch_size: see `SetOptions`.
    recalibrate: measure statistics of batch norms anew. exclude: patterns of layers that keep every channel.
    min_width: groups that every layer keeps. opset: of the ONNX file. device: to compute on. seed: of what is drawn.
    """

    selection: SelectionName | None = None
    samples: int = 2048
    rounds: int = 15
    compensate: bool = True
    reference: Reference = "network"
    recalibrate: bool = False
    exclude: tuple[str, ...] = ()
    min_width: int = 1
    batch_size: int = 64
    opset: int = 18
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Demand:
    """What one device asks for: its profile, None where a budget alone says what must hold, and that budget."""

    budget: Budget
    profile: DeviceProfile | None = None

    @property
    def name(self) -> str | None:
        return self.profile.name if self.profile else None


@dataclass(frozen=True, eq=False)
class Job:
    """What all devices' submodels of a network have in common.

    analysis: its structure; free: the same with what may not be narrowed. selection: never None.
    calibration: samples to select on; judging: others, to judge by. evaluated: to measure accuracy on. first: samples
    to prove submodels on. scored_in: the file of the scores. arrays: the checkpoint's tensors.
    """

    network: Network
    scores: Scores | None
    how: Pruning
    selection: SelectionName
    analysis: Analysis
    free: Analysis
    calibration_name: str | None
    calibration: Dataset | None
    judging: Dataset | None
    evaluated: Dataset | None
    first: torch.Tensor | None
    scored_in: Path | None
    arrays: Mapping[str, Array]
    unmodelled: tuple[str, ...]

    @property
    def exporting(self) -> ExportOptions:
        """How its ONNX files are written: compared on real samples where there are some."""
        real = self.calibration or self.evaluated
        return ExportOptions(None if real is None else real.x, self.how.seed, self.how.opset)

    @property
    def settings(self) -> dict[str, JsonValue]:
        """What was asked for, for the record."""
        how = self.how
        settings: dict[str, JsonValue] = {"selection": self.selection, **given({"exclude": list(how.exclude)})}
        settings |= {"min_width": how.min_width} if how.min_width > 1 else {}
        if self.calibration_name is not None:
            settings |= {"calibration": portable(self.calibration_name), "samples": how.samples, "seed": how.seed}
            settings |= {"batch_size": how.batch_size, "rounds": how.rounds, "compensate": how.compensate}
            settings |= {"reference": how.reference, "recalibrate": how.recalibrate}
        return settings


def prepare(
    network: Network,
    scores: Scores | None,
    how: Pruning,
    calibration: Dataset | None,
    evaluated: Dataset | None,
    on_warning: Callable[[str], None] = warn,
    scored_in: Path | None = None,
) -> Job:
    """Find the structure, and check that everything belongs together.

    Raises:
        UsageError: neither scores nor calibration samples say what channels are worth, or a pattern names no layer.
        InputError: scores are of another checkpoint, or lack what the selection needs; data do not fit.
        VerificationError: see coupling/analysis.py.
    """
    check_can_be_saved(network.model)
    for dataset in (calibration, evaluated):
        if dataset is not None:
            check_data(dataset, network)
    selection = how.selection or ("independent" if calibration is None else "linear")
    if scores is None and (calibration is None or selection == "independent"):
        raise UsageError("say what the channels are worth: give scores, or calibration samples to select on.")
    looked_at = calibration if calibration is not None else evaluated
    analysis = analysed(network, looked_at, on_warning)
    if scores is not None and not belong_together(scores, network, analysis):
        file = scored_in or "SCORES"
        raise InputError(
            f"{file}: these scores belong to another checkpoint than {named(network)}.\n"
            f"Score again: cahfp score {named(network)} --data SPEC -o {file} --force"
        )
    if selection != "independent" and calibration is None and (scores is None or scores.interactions is None):
        raise InputError(
            f"{scored_in or 'SCORES'}: it has no interactions, so sets cannot be told apart.\nScore again with "
            "gate-ggn and without --no-interactions, or pass --calibration SPEC."
        )
    fitted, judging = None, None
    if calibration is not None:
        by_set = selection != "independent"
        fitted, judging = (
            hold_out(calibration, how.samples, how.seed)
            if by_set
            else (subset(calibration, how.samples, how.seed), None)
        )
    return Job(
        network=network,
        scores=scores,
        how=how,
        selection=selection,
        analysis=analysis,
        free=replace(analysis, groups=protected(analysis.groups, how.exclude, how.min_width)),
        calibration_name=None if calibration is None else calibration.name,
        calibration=fitted,
        judging=judging,
        evaluated=evaluated,
        first=first_samples(looked_at),
        scored_in=scored_in,
        arrays={name: to_array(tensor, name) for name, tensor in network.tensors.items()},
        unmodelled=tuple(unmodelled_operators(analysis.traces[0])),
    )


def belong_together(scores: Scores, network: Network, analysis: Analysis) -> bool:
    """Whether the scores were measured on this checkpoint, with the groups that we find now."""
    return scores.metadata.checkpoint == network.digest and np.array_equal(scores.family, analysis.groups.family)
