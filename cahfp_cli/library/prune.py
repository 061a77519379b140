"""Pruning a network for a device: what all devices' submodels have in common, the choice for one, and its submodel."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import JsonValue

from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.checkpoint.metadata import SubmodelMetadata
from cahfp_cli.coupling.analysis import Analysis, cut
from cahfp_cli.coupling.masking import check_submodel
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.device.cost import Cost, compile_workload
from cahfp_cli.device.profile import DeviceProfile
from cahfp_cli.device.quantities import Count, Share
from cahfp_cli.device.workload import make_workload, unmodelled_operators
from cahfp_cli.errors import BudgetError, InputError, UsageError
from cahfp_cli.export.onnx_file import ExportOptions
from cahfp_cli.library.clock import seconds_here
from cahfp_cli.library.data import Data, dataset_of
from cahfp_cli.library.network import Network, analysed, check_data, first_samples, recorded, warn
from cahfp_cli.library.score import Progress, named, silent
from cahfp_cli.library.submodel import Submodel
from cahfp_cli.models.tensors import check_can_be_saved, saved_state, to_array
from cahfp_cli.provenance import given, portable, provenance
from cahfp_cli.pruning.budget import Budget, budget_of_profile
from cahfp_cli.pruning.selection import Selection, select
from cahfp_cli.pruning.set_selection import Reference, SetOptions, select_from_interactions, select_set
from cahfp_cli.pruning.submodel import gather_all, make_index_map, trained_arrays, with_arrays
from cahfp_cli.pruning.target import protected
from cahfp_cli.pruning.verified import Verified, select_verified
from cahfp_cli.running.device import pick_device, repeatable
from cahfp_cli.running.evaluation import Metrics, evaluate
from cahfp_cli.significance.measure import hold_out, subset
from cahfp_cli.significance.scores import Scores
from cahfp_cli.training.recalibration import recalibrate

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


def prune(
    network: Network,
    scores: Scores | None = None,
    budget: Budget | None = None,
    *,
    profile: DeviceProfile | None = None,
    calibration: Data | None = None,
    data: Data | None = None,
    how: Pruning | None = None,
    on_progress: Progress = silent,
    on_warning: Callable[[str], None] = warn,
) -> Submodel:
    """The submodel of a network that fits a device.

    Args:
        network: the full one; left as it is. scores: what `score` measured of it; not needed with calibration samples.
        budget: what must hold; that of the profile without. profile: the device, which a latency is predicted for.
        calibration: samples like those that the device will see, to select on and to compensate; no labels needed, but
            for that reference. data: to measure accuracy before and after on.
    Raises:
        UsageError: nothing says what must hold, or what channels are worth.
        BudgetError: the smallest network does not fit.
        InputError, VerificationError: see `prepare` and `cut_out`.
    """
    demand = demanded(budget, profile)
    seen, evaluated = (None if one is None else dataset_of(one, network.classes) for one in (calibration, data))
    job = prepare(network, scores, how or Pruning(), seen, evaluated, on_warning)
    picked = choose(job, demand, on_progress)
    for warning in picked.warnings:
        on_warning(warning)
    return cut_out(job, demand, picked, before(job))


def demanded(budget: Budget | None, profile: DeviceProfile | None) -> Demand:
    """What a device asks for; without a budget, its profile's own.

    Raises: UsageError: nothing limits the size, or a latency has no device to hold on.
    """
    if profile is None and budget is not None and budget.latency is not None:
        raise UsageError("a latency needs a profile: time depends on the device (see `cahfp profile list`)")
    if budget:
        return Demand(budget, profile)
    if profile is None:
        raise UsageError("say what must hold: a profile, or a budget such as macs=0.5 or keep=0.5")
    if profile.budget is None:
        raise UsageError(f"profile {profile.name} has no budget of its own: pass one, such as a latency of 5ms")
    return Demand(budget_of_profile(profile.budget), profile)


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


def choose(job: Job, demand: Demand, on_progress: Progress = silent) -> Selection:
    """Select the groups for one device. Raises: BudgetError: the smallest network does not fit; the device is named."""
    where = pick_device(job.how.device)
    model = job.network.model.to(where)
    itemsizes = {name: tensor.element_size() for name, tensor in saved_state(model).items()}
    cost = compile_workload(make_workload(job.free, itemsizes), demand.profile)
    groups, scores = job.free.groups, job.scores
    try:
        with repeatable(job.how.seed, where):
            if job.selection != "independent" and job.calibration is not None:
                options = set_options(job.how, job.selection)
                budget, judging = demand.budget, job.judging
                return select_set(model, job.free, cost, budget, job.calibration, options, on_progress, judging)
            assert scores is not None  # `prepare` saw to it
            if job.selection == "independent":
                return select(scores.significance, groups.family, cost, demand.budget, groups.narrowest)
            assert scores.interactions is not None  # as before
            return select_from_interactions(scores.interactions, groups, cost, demand.budget)
    except BudgetError as error:
        raise BudgetError(f"{demand.name}: {error}" if demand.name else str(error)) from None
    finally:
        model.cpu()


def set_options(how: Pruning, selection: SelectionName) -> SetOptions:
    return SetOptions(
        rounds=how.rounds,
        compensate=how.compensate,
        model="quadratic" if selection == "quadratic" else "linear",
        reference=how.reference,
        batch_size=how.batch_size,
    )


def choose_verified(job: Job, demand: Demand, on_progress: Progress = silent) -> Verified:
    """Select for this machine, by what it measures. Raises: BudgetError: nothing is fast enough."""
    threads = demand.profile.runtime.threads if demand.profile else 1
    network = job.network

    def measure(picked: Selection) -> float:
        submodel, _ = cut(network.model, job.free, picked.kept)
        return seconds_here(submodel, network.input_shape, network.input_dtype, threads, job.exporting)

    return select_verified(
        demand.budget, lambda budget: choose(job, replace(demand, budget=budget), on_progress), measure
    )


def before(job: Job) -> Metrics | None:
    """Accuracy and loss of the whole network, where there is data for it."""
    where = pick_device(job.how.device)
    found = None if job.evaluated is None else evaluate(job.network.model, job.evaluated, 256, where)
    job.network.model.cpu()
    return found


def cut_out(
    job: Job, demand: Demand, picked: Selection, full: Metrics | None, asked: Mapping[str, JsonValue] | None = None
) -> Submodel:
    """The submodel of a selection, proved to be what the masked network is.

    Args: full: accuracy of the whole network. asked: what else was asked for, for the record; the budget without.
    Raises: VerificationError: it is not.
    """
    network, how, where = job.network, job.how, pick_device(job.how.device)
    submodel, rewrites = cut(network.model, job.analysis, picked.kept)
    check_submodel(network.model, job.analysis, picked.kept, submodel, job.first)
    index_map = make_index_map(job.arrays, job.analysis.groups, picked.kept, network.digest, rewrites, picked.gates)
    compact = gather_all(job.arrays, index_map)
    with_arrays(submodel, compact)
    if how.recalibrate and job.calibration is not None and recalibrate(submodel, job.calibration.x, 2 * how.batch_size):
        compact = trained_arrays(submodel, index_map)
    after = evaluate(submodel, job.evaluated, 256, where) if job.evaluated is not None else None
    options = {
        **(limits_asked(demand.budget) if asked is None else asked),
        **job.settings,
        **given({"profile": demand.name, "data": None if job.evaluated is None else portable(job.evaluated.name)}),
    }
    metadata = SubmodelMetadata(
        model=recorded(network.spec),
        input_shape=network.input_shape,
        input_dtype=network.input_dtype,
        classes=network.classes,
        checkpoint=network.digest,
        profile=demand.name,
        provenance=provenance("prune", options, (*network.files, *((job.scored_in,) if job.scored_in else ()))),
    )
    report = describe(job, demand, picked, full, after)
    limit = picked.limits.by_name.get("storage")
    return Submodel(submodel.cpu(), index_map, metadata, report, compact, job.exporting, limit)


def limits_asked(budget: Budget) -> dict[str, JsonValue]:
    """A budget for the record."""
    values = {field.name: getattr(budget, field.name) for field in fields(budget)}
    return {n: v.value if isinstance(v, Share | Count) else v for n, v in values.items() if v is not None}


def describe(
    job: Job, demand: Demand, selection: Selection, full: Metrics | None, compact: Metrics | None
) -> dict[str, Any]:
    """The report of one submodel."""
    groups = job.analysis.groups
    widths = groups.widths(selection.kept).tolist()
    whole_widths = groups.widths(selection.kept | True).tolist()
    report: dict[str, Any] = {
        "profile": demand.name,
        "budget": {"met": True, "limits": selection.limits.by_name, "keep": demand.budget.keep},
        "binding": selection.binding,
        "groups": {"kept": int(selection.kept.sum()), "of": groups.count},
        "kept_groups": selection.kept.nonzero()[0].tolist(),
        "selection": job.settings,
        "widths": [
            {"family": name, "kept": kept, "of": whole}
            for name, kept, whole in zip(groups.names, widths, whole_widths, strict=True)
        ],
        "predicted": costs(selection.cost),
        "full": costs(selection.full),
        "not_modelled": list(job.unmodelled),
    }
    if job.scores is not None:
        report["significance_removed"] = float(job.scores.significance[~selection.kept].sum())
    if selection.prediction is not None:
        report["divergence"] = asdict(selection.prediction)
    if selection.gates is not None:
        moved = selection.gates[selection.kept]
        report["compensation"] = {"gates_moved": int((moved != 1).sum()), "least": moved.min(), "greatest": moved.max()}
    if job.evaluated is not None and full is not None and compact is not None:
        report["evaluation"] = {
            "data": portable(job.evaluated.name),
            "samples": full.samples,
            "before": figures(full),
            "after": figures(compact),
        }
    return report


def costs(cost: Cost) -> dict[str, Any]:
    """Costs as numbers: seconds, bytes, counts."""
    return {
        "latency_seconds": None if cost.latency_seconds is None else float(cost.latency_seconds),
        "memory_bytes": int(cost.memory_bytes),
        "storage_bytes": int(cost.storage_bytes),
        "macs": int(cost.macs),
        "params": int(cost.params),
    }


def figures(metrics: Metrics) -> dict[str, float]:
    return {"accuracy": metrics.accuracy, "loss": metrics.loss}
