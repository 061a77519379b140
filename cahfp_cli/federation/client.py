"""What a client does in a round: it trains the submodel that it was sent, and replies with its tensors."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.federation.memory import Mask
from cahfp_cli.formats.index_map import IndexMap
from cahfp_cli.pruning.submodel import trained_arrays
from cahfp_cli.training.sgd import TrainOptions, steps_per_epoch, train

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Task:
    """What a client gets: the compact network, what it holds of the global one, its own data (None on a server that has
    it not), how to train.

    mask: the channel groups that the network keeps, boolean (groups,). scaler: whether narrowed convolutions are scaled
    in training; rates: for each of those, by module name, its share of the full width.
    """

    client: int
    number: int
    mask: Mask
    model: nn.Module
    index_map: IndexMap
    data: Dataset | None
    options: TrainOptions
    scaler: bool
    rates: Mapping[str, float]


@dataclass(frozen=True)
class Reply:
    """What it sends back: the submodel's tensors by name, the number of its samples, its mean training loss (nats)."""

    arrays: Mapping[str, Array]
    num_examples: int
    loss: float


Trainer = Callable[[Task], Reply]


def train_client(task: Task) -> Reply:
    """Train on the CPU. Raises: InputError: training diverged."""
    assert task.data is not None
    with scaled(task.model, task.rates):
        report = train(task.model, task.data, task.options, CPU)
    return Reply(trained_arrays(task.model, task.index_map), len(task.data), report.epochs[-1].loss)


def samples_seen(samples: int, options: TrainOptions) -> int:
    """Samples that training passes forward and backward, with a last batch counted whole under `steps`."""
    if options.steps is not None:
        return options.steps * min(options.batch_size, samples)
    left_out = samples - min(samples, steps_per_epoch(samples, options.batch_size) * options.batch_size)
    return options.epochs * (samples - left_out)


@contextmanager
def scaled(model: nn.Module, rates: Mapping[str, float]) -> Iterator[None]:
    """While training, divide what the named convolutions give by their rate (HeteroFL); evaluation does not."""

    def divide(rate: float) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
        return lambda module, inputs, output: output / rate if module.training else output

    hooks = [model.get_submodule(name).register_forward_hook(divide(rate)) for name, rate in rates.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rates_of(model: nn.Module, index_map: IndexMap) -> dict[str, float]:
    """For each convolution that lost output channels, the share it kept."""
    rates = {}
    for name, module in model.named_modules():
        entry = index_map.tensors.get(f"{name}.weight")
        if isinstance(module, nn.Conv2d) and entry is not None and entry.submodel_shape[0] < entry.shape[0]:
            rates[name] = entry.submodel_shape[0] / entry.shape[0]
    return rates
