"""What a global network is worth: its own accuracy, and that of the submodels which devices get from it.

Statistics of batch norms belong to a network of certain widths, so both are measured after a phase in which statistics
alone are renewed: on the public split, or else by the clients, who return them to be pooled like any reply.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

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
from cahfp_cli.models.checkpoint_io import state_arrays, to_tensor
from cahfp_cli.pruning.index_map import IndexMap, TensorMap
from cahfp_cli.significance.measure import subset
from cahfp_cli.training.evaluation import evaluate, hits_by_class
from cahfp_cli.training.recalibration import BATCH_NORMS, recalibrate
from cahfp_cli.training.sgd import steps_per_epoch, train

BATCH = 256
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Assessment:
    """Accuracies on the test data, 0..1. plain: the global network with the statistics that the rounds left in it;
    recalibrated: after the phase of statistics. deployed: mean over devices of the submodels as cut; by_device: of
    each. own, tuned: mean over devices of the submodels as cut, and after one local epoch on the device's own data,
    where each class of the test data counts by its share of that data; None where only the devices have it. broken: why
    nothing could be measured, as for weights that are too large to compute with; accuracies are 0 then."""

    plain: float
    recalibrated: float
    loss: float | None
    deployed: float
    own: float | None
    tuned: float | None
    by_device: tuple[float, ...]
    broken: str | None = None


def assess(setting: Setting, method: Method, number: int, checkpoint: Path, memory: Memory) -> Assessment:
    """Measure the checkpoint that round `number` gave."""
    try:
        return _assess(setting, method, number, checkpoint, memory)
    except InputError as error:
        known = 0.0 if setting.common.train is not None else None
        nothing = (0.0,) * len(setting.common.devices)
        return Assessment(0.0, 0.0, None, 0.0, known, known, nothing, first_line(error))


def _assess(setting: Setting, method: Method, number: int, checkpoint: Path, memory: Memory) -> Assessment:
    common, test = setting.common, setting.common.test
    assert test is not None
    arrays = load_global(setting, checkpoint)
    situation = situation_of(setting, number, arrays, memory)
    whole = compact(common.network, common.analysis, method.network(situation, 0))
    plain = evaluate(whole, test, BATCH, CPU)
    renew_statistics(setting, whole)
    recalibrated = evaluate(whole, test, BATCH, CPU)
    cut: dict[bytes, tuple[nn.Module, Counts]] = {}
    in_test = np.bincount(test.y, minlength=test.classes)
    as_cut, own, tuned = [], [], []
    for client in range(len(common.devices)):
        mask = method.deploy(situation, client)
        key = mask.tobytes()
        if key not in cut:
            submodel = compact(common.network, common.analysis, mask)
            renew_statistics(setting, submodel)
            cut[key] = submodel, hits_by_class(submodel, test, BATCH, CPU)
        submodel, hits = cut[key]
        as_cut.append(float(hits.sum() / in_test.sum()))
        data = setting.data_of(client)
        if data is None:
            continue
        in_training = np.bincount(data.y, minlength=test.classes)
        own.append(accuracy_on(in_training, hits, in_test))
        after = tuned_copy(setting, submodel, data, number, client)
        tuned.append(accuracy_on(in_training, hits_by_class(after, test, BATCH, CPU), in_test))
    return Assessment(
        plain.accuracy,
        recalibrated.accuracy,
        recalibrated.loss,
        float(np.mean(as_cut)),
        float(np.mean(own)) if own else None,
        float(np.mean(tuned)) if tuned else None,
        tuple(as_cut),
    )


def accuracy_on(shares: Counts, hits: Counts, samples: Counts) -> float:
    """Accuracy if classes came in these shares, of a network that is right in `hits` of so many samples of each class;
    all (classes,). Classes of which there is no sample are left out; 0 if that leaves none."""
    seen = samples > 0
    weights = shares[seen]
    return float(weights @ (hits[seen] / samples[seen]) / max(1, weights.sum()))


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
    network.load_state_dict({name: to_tensor(array) for name, array in pooled.items()}, strict=False)
