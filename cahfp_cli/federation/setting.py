"""What stays the same in all rounds of a run: data, partition, fleet, network and its channel groups."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.checkpoint.digest import content_digest
from cahfp_cli.checkpoint.metadata import CheckpointMetadata, InputDtype, ModelSpec, Provenance
from cahfp_cli.coupling.adapters import adapt
from cahfp_cli.coupling.analysis import Analysis, analyse, cut, probe
from cahfp_cli.coupling.comparison import SAMPLES
from cahfp_cli.coupling.masking import check_submodel
from cahfp_cli.data.dataset import Dataset, check_fits
from cahfp_cli.data.npz import load_column
from cahfp_cli.data.spec import load_data, parse_spec
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.federation.client import CPU
from cahfp_cli.federation.devices import Device, make_devices
from cahfp_cli.federation.experiment import Experiment
from cahfp_cli.federation.partition import LEAST_SAMPLES, Indices, parse_partition, split_clients
from cahfp_cli.federation.streams import Purpose, derived
from cahfp_cli.models.checkpoint_io import load_checkpoint, save_checkpoint
from cahfp_cli.models.inputs import torch_type
from cahfp_cli.models.spec import build
from cahfp_cli.models.tensors import check_can_be_saved, saved_state
from cahfp_cli.reconstruction.rules import RULES
from cahfp_cli.significance.measure import take
from cahfp_cli.training.sgd import TrainOptions, train


@dataclass(frozen=True)
class Common:
    """What all runs of an experiment share. network: adapted, of the experiment's architecture; its weights are set
    anew before every use. train: of all clients, or on a node on-device its own; None on a server that has none of it.
    test, public: None on a node, which needs neither."""

    experiment: Experiment
    input_shape: tuple[int, ...]
    input_dtype: InputDtype
    classes: int
    train: Dataset | None
    test: Dataset | None
    public: Dataset | None
    network: nn.Module
    analysis: Analysis
    devices: tuple[Device, ...]
    provenance: Provenance

    def metadata(self) -> CheckpointMetadata:
        """Of every global checkpoint of the run."""
        return CheckpointMetadata(
            model=self.experiment.model,
            input_shape=self.input_shape,
            input_dtype=self.input_dtype,
            classes=self.classes,
            provenance=self.provenance,
        )


@dataclass(frozen=True)
class Setting:
    """One seed and one partition of an experiment. shares: the samples of each client; None on-device."""

    common: Common
    partition: str
    seed: int
    shares: tuple[Indices, ...] | None

    @property
    def experiment(self) -> Experiment:
        return self.common.experiment

    def data_of(self, client: int) -> Dataset | None:
        """The client's own samples; None where only it has them."""
        train = self.common.train
        return train if train is None or self.shares is None else take(train, self.shares[client])

    def samples_of(self, client: int) -> int | None:
        """Their number; None where only the client knows it."""
        if self.shares is not None:
            return len(self.shares[client])
        return None if self.common.train is None else len(self.common.train)


def prepare(experiment: Experiment, provenance: Provenance) -> Common:
    """Load the data, build and trace the network, and size each device's submodel.

    Raises: UsageError, InputError: a spec is not understood, or data and network do not fit. BudgetError: a device that
        nothing fits.
    """
    data = experiment.data
    trained = None if data.train is None else load_data(data.train)
    tested = load_data(data.test, default_split="test")
    public = None if data.public is None else load_data(data.public)
    return _common(experiment, provenance, trained, tested, public)


def prepare_client(experiment: Experiment, provenance: Provenance, own: str | None) -> Common:
    """As `prepare`, on a node: with training data alone.

    Args: own: spec of the node's own data, for the partition on-device.
    Raises: as `prepare`; UsageError: the node has no data, or has some where the experiment splits its own.
    """
    if experiment.on_device and own is None:
        raise UsageError("this node has no data of its own: start it with --node-config 'data=\"npz:FILE\"'.")
    if own is not None and not experiment.on_device:
        raise UsageError("a node's own data belongs to the partition on-device; this experiment splits data.train.")
    spec = experiment.data.train if own is None else own
    assert spec is not None
    trained = load_data(spec)
    if len(trained) < LEAST_SAMPLES:
        raise InputError(f"{spec}: {len(trained)} samples, and a client needs at least {LEAST_SAMPLES}.")
    return _common(experiment, provenance, trained, None, None)


def _common(
    experiment: Experiment,
    provenance: Provenance,
    trained: Dataset | None,
    tested: Dataset | None,
    public: Dataset | None,
) -> Common:
    if RULES[experiment.rule].by_curvature:
        raise UsageError(f"rule {experiment.rule!r} needs curvature of each client, which no reply of a round has.")
    there = [dataset for dataset in (trained, tested, public) if dataset is not None]
    input_shape, input_dtype = there[0].input_shape, there[0].input_dtype
    classes = experiment.data.classes or there[0].classes
    for dataset in there:
        check_fits(dataset, input_shape, classes, input_dtype)
    trained, tested, public = (  # each may lack some
        dataset and replace(dataset, classes=classes) for dataset in (trained, tested, public)
    )
    network = adapt(build(experiment.model, input_shape, classes))
    check_can_be_saved(network)
    samples = torch.from_numpy(there[0].x[:SAMPLES]) if len(there[0]) >= SAMPLES else None
    analysis = analyse(network, input_shape, torch_type(input_dtype), samples)
    if analysis.groups.count == 0:
        raise InputError(f"{experiment.model.spec}: no channel group of this network can be pruned.")
    # Rounds cut thousands of submodels, in the same way: one of them is compared on numbers.
    kept = probe(analysis.groups, analysis.groups.narrowest, 0.5, np.random.default_rng(experiment.seeds[0]))
    check_submodel(network, analysis, kept, cut(network, analysis, kept)[0], samples)
    itemsizes = {name: tensor.element_size() for name, tensor in saved_state(network).items()}
    devices = make_devices(experiment.fleet, analysis.groups, analysis, itemsizes)
    return Common(
        experiment,
        input_shape,
        input_dtype,
        classes,
        trained,
        tested,
        public,
        network.eval(),
        analysis,
        devices,
        provenance,
    )


def make_setting(common: Common, partition: str, seed: int) -> Setting:
    """Split the training data among the clients. Raises: InputError: it cannot be split so."""
    parsed, spec = parse_partition(partition), common.experiment.data.train
    if common.train is None or spec is None:
        return Setting(common, partition, seed, None)
    column = None if parsed.column is None else column_of(spec, parsed.column)
    shares = split_clients(parsed, common.train.y, len(common.devices), seed, column)
    return Setting(common, partition, seed, shares)


def column_of(spec: str, name: str) -> NDArray[Any]:
    """A column of the `npz` file that a data spec names, cut as the spec says.

    Raises: InputError: the data is no `npz` file.
    """
    parsed = parse_spec(spec)
    kind, _, path = parsed.source.partition(":")
    if kind != "npz":
        raise InputError(f"by-column({name}): only npz:FILE has columns, not {spec!r}.")
    return load_column(Path(path), name, parsed.split, parsed.rows)


def write_start(common: Common, seed: int, path: Path) -> str:
    """Write the checkpoint that all methods start from with this seed; returns its content digest.

    Raises: InputError: a given checkpoint is damaged, or of another network.
    """
    experiment = common.experiment
    start = experiment.start
    spec: ModelSpec = experiment.model
    if start.checkpoint is not None:
        loaded = load_checkpoint(
            Path(start.checkpoint),
            model=spec.spec,
            model_args=spec.args,
            input_shape=common.input_shape,
            input_dtype=common.input_dtype,
            classes=common.classes,
        )
        network = loaded.model
    else:
        network = build(spec, common.input_shape, common.classes, derived(Purpose.START, seed))
    if start.public_epochs and common.public is not None:
        options = TrainOptions(
            epochs=start.public_epochs, lr=start.lr, batch_size=experiment.train.batch_size, seed=seed
        )
        train(network, common.public, options, CPU)
    save_checkpoint(path, network, common.metadata(), force=True)
    return content_digest(path)
