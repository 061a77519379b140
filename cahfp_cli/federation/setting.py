"""What stays the same in all rounds of a run: data, partition, fleet, network and its channel groups."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import nn

from cahfp_cli.checkpoint.digest import content_digest
from cahfp_cli.checkpoint.metadata import CheckpointMetadata, ModelSpec, Provenance
from cahfp_cli.coupling.adapters import adapt
from cahfp_cli.coupling.analysis import Analysis, analyse
from cahfp_cli.data.dataset import Dataset, check_fits
from cahfp_cli.data.npz import load_column
from cahfp_cli.data.spec import load_data, parse_spec
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.federation.client import CPU
from cahfp_cli.federation.devices import Device, make_devices
from cahfp_cli.federation.experiment import Experiment
from cahfp_cli.federation.partition import Indices, parse_partition, split_clients
from cahfp_cli.federation.streams import Purpose, derived
from cahfp_cli.models.checkpoint_io import load_checkpoint, save_checkpoint
from cahfp_cli.models.spec import build
from cahfp_cli.reconstruction.rules import RULES
from cahfp_cli.significance.measure import take
from cahfp_cli.training.sgd import TrainOptions, train


@dataclass(frozen=True)
class Common:
    """What all runs of an experiment share. network: adapted, of the experiment's architecture; its weights are set
    anew before every use."""

    experiment: Experiment
    train: Dataset
    test: Dataset
    public: Dataset | None
    network: nn.Module
    analysis: Analysis
    devices: tuple[Device, ...]
    provenance: Provenance

    def metadata(self) -> CheckpointMetadata:
        """Of every global checkpoint of the run."""
        return CheckpointMetadata(
            model=self.experiment.model,
            input_shape=self.train.input_shape,
            classes=self.train.classes,
            provenance=self.provenance,
        )


@dataclass(frozen=True)
class Setting:
    """One seed and one partition of an experiment. shares: the samples of each client."""

    common: Common
    partition: str
    seed: int
    shares: tuple[Indices, ...]

    @property
    def experiment(self) -> Experiment:
        return self.common.experiment

    def data_of(self, client: int) -> Dataset:
        return take(self.common.train, self.shares[client])


def prepare(experiment: Experiment, provenance: Provenance) -> Common:
    """Load the data, build and trace the network, and size each device's submodel.

    Raises: UsageError, InputError: a spec is not understood, or data and network do not fit. BudgetError: a device that
        nothing fits.
    """
    if RULES[experiment.rule].by_curvature:
        raise UsageError(f"rule {experiment.rule!r} needs curvature of each client, which no reply of a round has.")
    data = experiment.data
    trained, tested = load_data(data.train), load_data(data.test, default_split="test")
    public = load_data(data.public) if data.public is not None else None
    for dataset in (tested, public):
        if dataset is not None:
            check_fits(dataset, trained.input_shape, trained.classes)
    network = adapt(build(experiment.model, trained.input_shape, trained.classes))
    analysis = analyse(network, trained.input_shape)
    if analysis.groups.count == 0:
        raise InputError(f"{experiment.model.spec}: no channel group of this network can be pruned.")
    itemsizes = {name: tensor.element_size() for name, tensor in network.state_dict().items()}
    devices = make_devices(experiment.fleet, analysis.groups, analysis, itemsizes)
    return Common(experiment, trained, tested, public, network.eval(), analysis, devices, provenance)


def make_setting(common: Common, partition: str, seed: int) -> Setting:
    """Split the training data among the clients. Raises: InputError: it cannot be split so."""
    parsed = parse_partition(partition)
    column = None
    if parsed.column is not None:
        column = column_of(common.experiment.data.train, parsed.column)
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
    return load_column(Path(path), name, parsed.split)[parsed.first : parsed.last]


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
            input_shape=common.train.input_shape,
            classes=common.train.classes,
        )
        network = loaded.model
    else:
        network = build(spec, common.train.input_shape, common.train.classes, derived(Purpose.START, seed))
    if start.public_epochs and common.public is not None:
        options = TrainOptions(
            epochs=start.public_epochs, lr=start.lr, batch_size=experiment.train.batch_size, seed=seed
        )
        train(network, common.public, options, CPU)
    save_checkpoint(path, network, common.metadata(), force=True)
    return content_digest(path)
