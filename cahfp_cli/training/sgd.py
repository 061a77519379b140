"""The local SGD loop: from scratch, fine-tuning, or a client's own training of a submodel."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cahfp_cli.data.batches import batches
from cahfp_cli.data.dataset import Dataset, Labels, Samples
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.models.tensors import is_constant, is_finite, saved_state
from cahfp_cli.running.device import repeatable
from cahfp_cli.running.logits import backward, class_logits
from cahfp_cli.training import augment

AUGMENT_STREAM = 1
"""Sets the shifts' random stream apart from the shuffle's."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    epochs: passes over the data. steps: if given, exactly so many optimiser steps instead, however many passes they
    take. lr: peak learning rate. momentum: Nesterov's; 0 is plain SGD. weight_decay: on weights of two axes and more,
    so not on biases and norms. schedule: cosine to zero over all steps, or constant. augment: shift images of 16
    pixels and up. grad_clip: largest gradient norm, None for no limit. balanced: in the loss each logit is shifted by
    the log of its class's share of the data, (samples + 1) / (all samples + classes), so that what is learnt does not
    depend on how often the classes are there (balanced softmax, Ren et al. 2020; Menon et al. 2021, section 4.2).
    """

    epochs: int = 10
    steps: int | None = None
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    label_smoothing: float = 0.0
    augment: bool = False
    seed: int = 0
    grad_clip: float | None = None
    balanced: bool = False


@dataclass(frozen=True)
class Epoch:
    """Mean loss (nats) and accuracy over the training samples as they were seen, before each step's update."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class TrainReport:
    """What training did: its epochs (the last may be cut short by `steps`), wall time in seconds, optimiser steps."""

    epochs: tuple[Epoch, ...]
    seconds: float
    steps: int


OnEpoch = Callable[[int, int, Epoch], None]
"""Called after each epoch with (epochs done, epochs in all, its result)."""


def train(
    model: nn.Module, dataset: Dataset, options: TrainOptions, device: torch.device, on_epoch: OnEpoch | None = None
) -> TrainReport:
    """Train `model` in place by SGD with cross-entropy; it ends on `device` in evaluation mode.

    On the CPU the result depends only on the model, the data, the options and the number of threads. A last batch of
    one sample is left out, since batch norm has no variance for it.
    Raises: UsageError: an option is out of range; InputError: a non-finite loss or weight, or too little data.
    """
    check_options(options)
    per_epoch = steps_per_epoch(len(dataset), options.batch_size)
    if per_epoch == 0:
        raise InputError(f"{dataset.name}: one sample is too little to train on with batches of {options.batch_size}.")
    total = options.steps if options.steps is not None else per_epoch * options.epochs
    epochs = math.ceil(total / per_epoch)
    started = time.perf_counter()
    results: list[Epoch] = []
    constants = infinite_constants(model)
    with repeatable(options.seed, device):
        model.to(device).train()
        run = start(model, dataset, options, device, total)
        for epoch in range(epochs):
            samples = islice(epoch_batches(dataset, options, epoch), min(per_epoch, total - epoch * per_epoch))
            results.append(run_epoch(run, samples, dataset.classes, epoch))
            if on_epoch is not None:
                on_epoch(epoch + 1, epochs, results[-1])
    model.eval()
    check_finite(model, options, constants)
    return TrainReport(tuple(results), time.perf_counter() - started, total)


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Batches in a pass, without a last one of a single sample that is short of `batch_size`."""
    whole, rest = divmod(samples, batch_size)
    return whole + (rest > 1)


def epoch_batches(dataset: Dataset, options: TrainOptions, epoch: int) -> Iterator[tuple[Samples, Labels]]:
    """The batches of epoch number `epoch`: shuffled, and shifted if the options say so."""
    random = np.random.default_rng((options.seed, epoch, AUGMENT_STREAM))
    shift = options.augment and augment.applies_to(dataset.input_shape)
    for x, y in batches(dataset, options.batch_size, seed=(options.seed, epoch)):
        yield (augment.shifted(x, random) if shift else x), y


@dataclass(frozen=True)
class Run:
    """What stays the same from step to step; `schedule` sets the optimiser's learning rate and counts the steps."""

    model: nn.Module
    optimiser: torch.optim.SGD
    schedule: torch.optim.lr_scheduler.LambdaLR
    options: TrainOptions
    device: torch.device
    shift: torch.Tensor


def log_shares(dataset: Dataset) -> torch.Tensor:
    """Of each class in the data, with a sample more of each than there is; float32 (classes,)."""
    counts = torch.from_numpy(np.bincount(dataset.y, minlength=dataset.classes)).float() + 1
    return (counts / counts.sum()).log()


def start(model: nn.Module, dataset: Dataset, options: TrainOptions, device: torch.device, total: int) -> Run:
    """A run of `total` steps; weights of two axes and more decay. Raises: InputError: nothing to train."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise InputError("the model has no parameters to train.")
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0)

    def factor(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / total)) if options.schedule == "cosine" else 1.0

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    shift = log_shares(dataset) if options.balanced else torch.zeros(dataset.classes)
    return Run(model, optimiser, schedule, options, device, shift.to(device))


def run_epoch(run: Run, samples: Iterable[tuple[Samples, Labels]], classes: int, epoch: int) -> Epoch:
    """Take one optimiser step for each batch. Raises: InputError: the loss is not finite, or the data does not fit."""
    loss_sum, correct, seen = 0.0, 0, 0
    for step, (x, y) in enumerate(samples):
        labels = torch.from_numpy(y).to(run.device)
        logits = class_logits(run.model, x, classes, run.device)
        shifted = logits[:, :classes] + run.shift if run.options.balanced else logits
        loss = F.cross_entropy(shifted, labels, label_smoothing=run.options.label_smoothing)
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(
                f"training gave a loss of {value} in epoch {epoch + 1}, step {step + 1}. "
                f"Try a smaller --lr than {run.options.lr:g}."
            )
        run.optimiser.zero_grad(set_to_none=True)
        with backward():
            loss.backward()  # type: ignore[no-untyped-call]
        if run.options.grad_clip is not None:
            nn.utils.clip_grad_norm_(run.model.parameters(), run.options.grad_clip)
        run.optimiser.step()
        run.schedule.step()
        loss_sum += value * len(y)
        correct += int((logits.argmax(1) == labels).sum())
        seen += len(y)
    return Epoch(loss=loss_sum / seen, accuracy=correct / seen)


def check_options(options: TrainOptions) -> None:
    """Raises: UsageError: an option is out of range."""
    rules = {
        "epochs must be 1 or more": options.epochs >= 1,
        "steps must be 1 or more": options.steps is None or options.steps >= 1,
        "batch-size must be 1 or more": options.batch_size >= 1,
        "lr must be positive, and below 1e30": 0 < options.lr < 1e30,
        "momentum must be in 0..1, 1 excluded": 0 <= options.momentum < 1,
        "weight-decay must be 0 or more, and below 1e30": 0 <= options.weight_decay < 1e30,
        "schedule must be cosine or constant": options.schedule in ("cosine", "constant"),
        "label-smoothing must be in 0..1, 1 excluded": 0 <= options.label_smoothing < 1,
        "grad-clip must be positive": options.grad_clip is None or 0 < options.grad_clip < math.inf,
        "seed must be 0 or more": options.seed >= 0,
    }
    for rule, holds in rules.items():
        if not holds:
            raise UsageError(f"--{rule}.")


def infinite_constants(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is not trained and not finite from the start, such as a mask of minus infinity; copies, by name."""
    return {
        name: tensor.detach().clone()
        for name, tensor in saved_state(model).items()
        if not tensor.requires_grad and not is_finite(tensor).all()
    }


def check_finite(model: nn.Module, options: TrainOptions, constants: Mapping[str, torch.Tensor]) -> None:
    """Raises: InputError: training left NaN or Inf in the model's state where none of its `constants` has it."""
    for name, tensor in saved_state(model).items():
        constant = constants.get(name)
        if not is_finite(tensor).all() and (constant is None or not is_constant(tensor.cpu(), constant.cpu())):
            raise InputError(f"training left NaN or Inf in {name!r}. Try a smaller --lr than {options.lr:g}.")
