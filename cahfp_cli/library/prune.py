"""Pruning a network for a device: what all devices' submodels have in common, the choice for one, and its submodel."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from pydantic import JsonValue

from cahfp_cli.checkpoint.metadata import SubmodelMetadata
from cahfp_cli.coupling.analysis import cut
from cahfp_cli.coupling.masking import check_submodel
from cahfp_cli.device.cost import compile_workload
from cahfp_cli.device.profile import DeviceProfile
from cahfp_cli.device.workload import make_workload
from cahfp_cli.errors import BudgetError, UsageError
from cahfp_cli.library.clock import seconds_here
from cahfp_cli.library.data import Data, dataset_of
from cahfp_cli.library.network import Network, recorded, warn
from cahfp_cli.library.pruning_job import Demand, Job, Pruning, SelectionName, prepare
from cahfp_cli.library.pruning_report import describe, limits_asked
from cahfp_cli.library.score import Progress, silent
from cahfp_cli.library.submodel import Submodel
from cahfp_cli.models.tensors import saved_state
from cahfp_cli.provenance import given, portable, provenance
from cahfp_cli.pruning.budget import Budget, budget_of_profile
from cahfp_cli.pruning.selection import Selection, select
from cahfp_cli.pruning.set_selection import SetOptions, select_from_interactions, select_set
from cahfp_cli.pruning.submodel import gather_all, make_index_map, trained_arrays, with_arrays
from cahfp_cli.pruning.verified import Verified, select_verified
from cahfp_cli.running.device import pick_device, repeatable
from cahfp_cli.running.evaluation import Metrics, evaluate
from cahfp_cli.significance.scores import Scores
from cahfp_cli.training.recalibration import recalibrate


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
