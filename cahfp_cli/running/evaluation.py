"""Accuracy and loss of a network, as a module or as an ONNX file."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cahfp_cli.data.batches import batches
from cahfp_cli.data.dataset import Dataset, Labels
from cahfp_cli.errors import InputError
from cahfp_cli.models.random_streams import random_streams
from cahfp_cli.models.undisturbed import undisturbed
from cahfp_cli.running import onnx_session
from cahfp_cli.running.logits import class_logits

Logits = npt.NDArray[Any]


@dataclass(frozen=True)
class Metrics:
    """accuracy in 0..1, loss as the mean cross-entropy in nats, both over `samples`."""

    accuracy: float
    loss: float
    samples: int


def evaluate(model: nn.Module, dataset: Dataset, batch_size: int, device: torch.device) -> Metrics:
    """Measure a module, moved to `device` and else left as it was. What it draws at random, it draws alike
    every time.

    Raises: InputError: the data does not fit the model, or the outputs are not finite.
    """
    model.to(device)
    streams = random_streams(0, () if device.type == "cpu" else (device,))
    with undisturbed(model), torch.inference_mode(), streams:
        model.eval()
        return measure(
            (class_logits(model, x, dataset.classes, device).cpu().double().numpy(), y)
            for x, y in batches(dataset, batch_size, seed=None)
        )


def hits_by_class(model: nn.Module, dataset: Dataset, batch_size: int, device: torch.device) -> npt.NDArray[np.int64]:
    """How many samples of each class a module in evaluation mode classifies rightly, (classes,).

    Raises: InputError: the data does not fit the model.
    """
    hits = np.zeros(dataset.classes, np.int64)
    with undisturbed(model), torch.inference_mode():
        for x, y in batches(dataset, batch_size, seed=None):
            right = class_logits(model, x, dataset.classes, device).argmax(1).cpu().numpy() == y
            hits += np.bincount(y[right], minlength=dataset.classes)
    return hits


def evaluate_onnx(path: Path, dataset: Dataset, batch_size: int, threads: int | None = None) -> Metrics:
    """Measure an ONNX file in ONNX Runtime on the CPU. A file of a fixed batch size is run at that size.

    Raises: InputError: the file is not a network of one input, the data does not fit it, or the outputs are not finite.
    """
    session = onnx_session.open_session(path, threads)
    size = onnx_session.fixed_batch(session) or batch_size
    return measure(
        (onnx_session.class_logits(session, x, dataset.classes, path), y) for x, y in batches(dataset, size, seed=None)
    )


def measure(results: Iterable[tuple[Logits, Labels]]) -> Metrics:
    """Metrics over batches of logits (n, outputs) and labels (n,), summed in float64.

    Raises: InputError: a loss is NaN or Inf.
    """
    loss, correct, samples = 0.0, 0, 0
    for logits, y in results:
        loss += float(cross_entropy(logits.astype(np.float64), y).sum())
        correct += int((logits.argmax(axis=1) == y).sum())
        samples += len(y)
    if not math.isfinite(loss):
        raise InputError(f"the model's outputs give a loss of {loss}: its weights or the data are out of range.")
    return Metrics(accuracy=correct / samples, loss=loss / samples, samples=samples)


def cross_entropy(logits: Logits, y: Labels) -> Logits:
    """Per sample, (n,): log sum exp(logits) - logits[y]."""
    with np.errstate(invalid="ignore"):  # Inf - Inf gives the NaN that the caller reports
        shifted = logits - logits.max(axis=1, keepdims=True)
    losses: Logits = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(y)), y]
    return losses
