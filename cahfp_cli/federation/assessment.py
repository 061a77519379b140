"""What a global network is worth: its own accuracy, and that of the submodels which devices get from it.

Statistics of batch norms belong to a network of certain widths, so both are measured after a phase in which statistics
alone are renewed: on the public split, or else by the clients, who return them to be pooled like any reply.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.checkpoint.digest import arrays_digest
from cahfp_cli.checkpoint.dtypes import dtype_code
from cahfp_cli.coupling.slicing import clone
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.errors import InputError, first_line
from cahfp_cli.federation.bound import Part, Terms, terms
from cahfp_cli.federation.client import CPU
from cahfp_cli.federation.cutting import compact
from cahfp_cli.federation.memory import Mask, Memory
from cahfp_cli.federation.merging import Merger
from cahfp_cli.federation.methods import Method
from cahfp_cli.federation.rounds import learning_rate, load_global, situation_of, train_options
from cahfp_cli.federation.setting import Setting
from cahfp_cli.federation.streams import Purpose, derived
from cahfp_cli.formats.index_map import IndexMap, TensorMap
from cahfp_cli.models.tensors import load_state, state_arrays, to_tensor
from cahfp_cli.running.evaluation import evaluate, hits_by_class
from cahfp_cli.significance.measure import subset
from cahfp_cli.training.recalibration import BATCH_NORMS, recalibrate
from cahfp_cli.training.sgd import steps_per_epoch, train

BATCH = 256
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Assessment:
    """Accuracies on the test data, 0..1. plain: the global network with the statistics that the rounds left in it;
    recalibrated: after the phase of statistics, loss: then. deployed: mean over devices of the submodels as cut;
    by_device: of each. own, tuned: mean over devices of the submodels as cut, and after one local epoch on the device's
    own data, where each class of the test data counts by its share of that data; None where only the devices have it.

    Each figure stands for itself: one that could not be measured is None, and so is a mean of which one device's is
    missing. missing: why, by the figure's name.
    """

    plain: float | None
    recalibrated: float | None
    loss: float | None
    deployed: float | None
    own: float | None
    tuned: float | None
    by_device: tuple[float | None, ...]
    missing: Mapping[str, str]


def assess(setting: Setting, method: Method, number: int, checkpoint: Path, memory: Memory) -> Assessment:
    """Measure the checkpoint that round `number` gave."""
    common, test = setting.common, setting.common.test
    assert test is not None
    arrays = load_global(setting, checkpoint)
    situation = situation_of(setting, number, arrays, memory)
    whole = compact(common.network, common.analysis, method.network(situation, 0))
    plain = tried(partial(evaluate, whole, test, BATCH, CPU))
    recalibrated = tried(partial(renewed_and, evaluate, setting, whole, test))
    found: dict[str, list[float | str]] = {"deployed": [], "own": [], "tuned": []}  # of each device, or why not
    cut: dict[bytes, tuple[nn.Module, Counts | str]] = {}
    in_test = np.bincount(test.y, minlength=test.classes)
    for client in range(len(common.devices)):
        mask = method.deploy(situation, client)
        key = mask.tobytes()
        if key not in cut:
            made = compact(common.network, common.analysis, mask)
            cut[key] = made, tried(partial(renewed_and, hits_by_class, setting, made, test))
        submodel, hits = cut[key]
        found["deployed"].append(hits if isinstance(hits, str) else float(hits.sum() / in_test.sum()))
        data = setting.data_of(client)
        if data is None:
            continue
        in_training = np.bincount(data.y, minlength=test.classes)
        after = hits
        if not isinstance(hits, str):
            after = tried(partial(tuned_hits, setting, submodel, data, number, client))
        for name, own in (("own", hits), ("tuned", after)):
            found[name].append(own if isinstance(own, str) else accuracy_on(in_training, own, in_test))
    missing = {name: why for name, why in (("plain", plain), ("recalibrated", recalibrated)) if isinstance(why, str)}
    for name, values in found.items():
        faults = [f"client {client}: {why}" for client, why in enumerate(values) if isinstance(why, str)]
        missing |= {name: faults[0]} if faults else {}
    return Assessment(
        None if isinstance(plain, str) else plain.accuracy,
        None if isinstance(recalibrated, str) else recalibrated.accuracy,
        None if isinstance(recalibrated, str) else recalibrated.loss,
        mean(found["deployed"]),
        mean(found["own"]),
        mean(found["tuned"]),
        tuple(None if isinstance(value, str) else value for value in found["deployed"]),
        missing,
    )


def unmeasured(setting: Setting, why: str) -> Assessment:
    """Of a run that has nothing to be measured."""
    ours = setting.common.train is not None
    names = ("plain", "recalibrated", "deployed", *(("own", "tuned") if ours else ()))
    nothing = (None,) * len(setting.common.devices)
    return Assessment(None, None, None, None, None, None, nothing, dict.fromkeys(names, why))


Found = TypeVar("Found")


def tried(measure: Callable[[], Found]) -> Found | str:
    """What is measured, or why it cannot be: weights that are too large to compute with, training that diverges."""
    try:
        return measure()
    except InputError as error:
        return first_line(error)


def renewed_and(measure: Callable[..., Found], setting: Setting, network: nn.Module, test: Dataset) -> Found:
    """What is measured of a network after the phase of statistics, which changes it."""
    renew_statistics(setting, network)
    return measure(network, test, BATCH, CPU)


def tuned_hits(setting: Setting, submodel: nn.Module, data: Dataset, number: int, client: int) -> Counts:
    """Of each class, how many test samples a submodel has right after one local epoch on the client's own data."""
    test = setting.common.test
    assert test is not None
    return hits_by_class(tuned_copy(setting, submodel, data, number, client), test, BATCH, CPU)


def mean(values: Sequence[float | str]) -> float | None:
    """Of all devices; None if there are none, or where that of one is missing."""
    sound = [value for value in values if not isinstance(value, str)]
    return float(np.mean(sound)) if sound and len(sound) == len(values) else None


def accuracy_on(shares: Counts, hits: Counts, samples: Counts) -> float | str:
    """Accuracy if classes came in these shares, of a network that is right in `hits` of so many samples of each class;
    all (classes,). Classes of which there is no sample are left out; if that leaves none, it is said instead."""
    seen = samples > 0
    weights = shares[seen]
    if not weights.any():
        return "the test data has no sample of its classes"
    return float(weights @ (hits[seen] / samples[seen]) / weights.sum())


def bound_terms(setting: Setting, number: int, before: Path, after: Path, merged: Mapping[int, Mask]) -> Terms:
    """The terms of the bound of round `number`, which made the checkpoint `after` from `before`.

    Args: merged: masks of the clients whose replies were merged.
    """
    common, how = setting.common, setting.experiment.train
    load_global(setting, after)
    new = clone(common.network)
    load_global(setting, before)
    everyone = ((client, setting.data_of(client)) for client in range(len(common.devices)))
    data = {client: own for client, own in everyone if own is not None}
    parts = {}
    for client, mask in merged.items():
        steps = how.steps or how.epochs * steps_per_epoch(len(data[client]), how.batch_size)
        axes = common.analysis.groups.indices(mask)
        parts[client] = Part(compact(common.network, common.analysis, mask), axes, steps)
    lr = learning_rate(setting.experiment, number)
    return terms(common.network, data, parts, new, lr, how.batch_size)


def tuned_copy(setting: Setting, submodel: nn.Module, data: Dataset, number: int, client: int) -> nn.Module:
    """A copy after one local epoch on the client's own data."""
    experiment, copy = setting.experiment, clone(submodel)
    lr = experiment.evaluation.tuning_lr or experiment.train.lr
    options = train_options(setting, lr, derived(Purpose.DEPLOYMENT, setting.seed, number, client))
    train(copy, data, replace(options, epochs=1, steps=None, balanced=False), CPU)
    return copy


def renew_statistics(setting: Setting, network: nn.Module) -> None:
    """Measure the statistics of a network's batch norms anew, in place; nothing else changes."""
    if not any(isinstance(module, BATCH_NORMS) for module in network.modules()):
        return
    public, size = setting.common.public, setting.experiment.train.batch_size
    if public is not None:
        recalibrate(network, public.x, size)
        return
    samples = setting.experiment.evaluation.samples
    before = {name: array.copy() for name, array in state_arrays(network).items()}
    merger = Merger.of(before, setting.common.metadata())
    whole = IndexMap(
        arrays_digest(before),
        {name: TensorMap(a.shape, dtype_code(a.dtype), (None,) * a.ndim) for name, a in before.items()},
    )
    clients = []
    for client in range(len(setting.common.devices)):
        data = setting.data_of(client)
        assert data is not None  # else there is a public split
        own = subset(data, samples, derived(Purpose.STATISTICS, setting.seed, client))
        measured = clone(network)
        recalibrate(measured, own.x, size)
        clients.append(merger.admitted(client, state_arrays(measured), len(data), whole))
    pooled = merger.merged(clients, "covered").arrays
    load_state(network, {name: to_tensor(array) for name, array in pooled.items()})
