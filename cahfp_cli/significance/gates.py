"""Gates: one scalar z_c a channel group, 1 in the full model; first and second derivatives of the loss in them.

The gate of a group multiplies what the group's *consumers* read: the inputs of the convolutions and matrix products
that contract its channels. Every path from the group to the loss passes a consumer, so z_c = 0 is exactly the model
without the group, also through depthwise convolutions, normalisation and residual additions. With consumer input `a`
and the gradient `da` through that consumer alone, the gate's gradient for sample b is `sum over positions and
consumers of a * da`: no per-sample weight gradients are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from cahfp_cli.coupling.calls import CONTRACTING, channels_read
from cahfp_cli.coupling.groups import KEPT, ChannelGroups, Consumer
from cahfp_cli.errors import InputError
from cahfp_cli.models.outputs import logits_of

Floats = NDArray[np.float64]
EXACT_CLASSES = 16
DRAWS = 8


@dataclass(frozen=True)
class GateStatistics:
    """Means over calibration samples, each float64 (groups,).

    gradient: dL/dz of the mean cross-entropy, nats.
    gradient_magnitude: mean of the absolute per-sample gradient.
    gradient_square: mean of the squared per-sample gradient (empirical Fisher diagonal).
    curvature: diagonal of the generalised Gauss-Newton matrix, E[J' (diag p - p p') J].
    samples: number of samples; loss: their mean cross-entropy, nats.
    """

    gradient: Floats
    gradient_magnitude: Floats
    gradient_square: Floats
    curvature: Floats
    samples: int
    loss: float


class ConsumerInputs(TorchFunctionMode):
    """Collects what every consumer reads while a model runs: the consumer, its input, the axis of the channels."""

    def __init__(self, groups: ChannelGroups) -> None:
        super().__init__()
        self.consumers = {c.call: c for c in groups.consumers if (c.groups != KEPT).any()}
        self.seen: list[tuple[Consumer, torch.Tensor, int]] = []
        self._calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CONTRACTING:
            consumer = self.consumers.get(self._calls)
            self._calls += 1
            if consumer is not None:
                x, axis = channels_read(func, args, kwargs), CONTRACTING[func][1]
                if x.shape[axis] != len(consumer.groups):
                    raise InputError(
                        f"gates of {consumer.tensor} cannot be measured: the model runs in another way now"
                    )
                watched = self.watch(consumer, x, axis)
                args = tuple(watched if value is x else value for value in args)
                kwargs = {name: watched if value is x else value for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def watch(self, consumer: Consumer, x: torch.Tensor, axis: int) -> torch.Tensor:
        """A tensor of its own for the consumer: nothing flows through it but what this consumer reads."""
        watched = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        self.seen.append((consumer, watched, axis))
        return watched


def gate_statistics(
    model: nn.Module,
    groups: ChannelGroups,
    x: NDArray[Any],
    y: NDArray[np.int64],
    *,
    batch_size: int = 64,
    draws: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> GateStatistics:
    """Measure gradients and curvature of every gate over calibration samples.

    Args:
        model: left as it is; runs in evaluation mode on the device of its parameters.
        groups: its channel groups.
        x: samples, float32 (n, ...) or integer tokens; y: labels, int64 (n,).
        draws: None takes the exact Gauss-Newton diagonal with one backward pass a class up to 16 classes, and 8
            draws beyond; a number takes that many labels drawn from the model's own predictions a sample, an
            unbiased estimate (the true Fisher equals the GGN for a softmax likelihood).
    Raises:
        InputError: a sample gave a non-finite output or gradient (its number is named), or a consumer was not seen.
    """
    device = next(model.parameters()).device
    model.eval()
    totals = np.zeros((4, groups.count))
    loss = 0.0
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, len(x), batch_size):
        samples = torch.from_numpy(x[first : first + batch_size]).to(device)
        labels = torch.from_numpy(y[first : first + batch_size]).to(device)
        batch = measure_batch(model, groups, samples, labels, draws, generator)
        bad = ~torch.isfinite(batch.losses) | ~torch.isfinite(batch.gradient).all(1)
        if bad.any():
            number = first + int(torch.nonzero(bad)[0])
            raise InputError(
                f"calibration sample {number} gives a non-finite loss or gradient: check it and the weights"
            )
        # To the CPU first: not every device has float64.
        loss += float(batch.losses.cpu().double().sum())
        gradient, curvature = batch.gradient.cpu().double().numpy(), batch.curvature.cpu().double().numpy()
        totals += np.stack([gradient.sum(0), np.abs(gradient).sum(0), np.square(gradient).sum(0), curvature.sum(0)])
        on_progress(min(first + batch_size, len(x)), len(x))
    totals /= len(x)
    return GateStatistics(totals[0], totals[1], totals[2], totals[3], len(x), loss / len(x))


@dataclass(frozen=True)
class BatchStatistics:
    """Per-sample results of one batch: losses (b,), gradient and curvature (b, groups)."""

    losses: torch.Tensor
    gradient: torch.Tensor
    curvature: torch.Tensor


def measure_batch(
    model: nn.Module,
    groups: ChannelGroups,
    samples: torch.Tensor,
    labels: torch.Tensor,
    draws: int | None,
    generator: torch.Generator,
) -> BatchStatistics:
    """One forward pass, then one backward pass a class or a draw; weights get no gradients."""
    collector = ConsumerInputs(groups)
    with torch.enable_grad(), collector:
        logits = logits_of(model(samples))
    if len(collector.seen) < len(collector.consumers):
        raise InputError("gates cannot be measured: the model runs fewer products than when it was traced")
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    inputs = [x for _, x, _ in collector.seen]
    if not inputs or not torch.isfinite(losses).all():  # nothing to measure, or nothing that the caller accepts
        nothing = logits.new_zeros(len(samples), groups.count)
        return BatchStatistics(losses.detach(), nothing, nothing)

    def backward(output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients in what the consumers read, None where `output` does not depend on it."""
        return torch.autograd.grad(output, inputs, retain_graph=True, allow_unused=True)

    several_rows = any(axis < 0 and x.shape[:-1].numel() > len(samples) for _, x, axis in collector.seen)
    of_first = backward(logits[0].square().sum()) if several_rows else (None,) * len(inputs)
    strides = [
        sample_stride(dx, len(samples), axis == 1) for dx, (_, _, axis) in zip(of_first, collector.seen, strict=True)
    ]
    numbers = [torch.from_numpy(np.where(c.groups == KEPT, groups.count, c.groups)) for c, _, _ in collector.seen]
    numbers = [number.to(logits.device) for number in numbers]

    def gate_gradients(output: torch.Tensor) -> torch.Tensor:
        """d output / d gate for each sample, (b, groups); `output` is a sum over samples."""
        gradients = backward(output)
        total = logits.new_zeros(len(samples), groups.count + 1)
        for (_, x, axis), dx, stride, number in zip(collector.seen, gradients, strides, numbers, strict=True):
            if dx is None:  # read by something that the logits do not depend on
                continue
            product = x.detach() * dx
            by_position = product.flatten(2).sum(2) if axis == 1 else product.flatten(0, -2)
            channels = by_position.shape[1]
            by_channel = by_position.reshape(-1, len(samples), stride, channels).sum((0, 2))
            total.index_add_(1, number, by_channel)
        return total[:, : groups.count]

    probabilities = logits.detach().softmax(1)
    classes = logits.shape[1]
    if draws is None and classes <= EXACT_CLASSES:
        jacobian = torch.stack([gate_gradients(logits[:, k].sum()) for k in range(classes)], 1)
        mean = torch.einsum("bk,bkg->bg", probabilities, jacobian)
        curvature = torch.einsum("bk,bkg->bg", probabilities, (jacobian - mean[:, None]).square())
        gradient = mean - jacobian[torch.arange(len(labels)), labels]
        return BatchStatistics(losses.detach(), gradient, curvature)
    gradient = gate_gradients(losses.sum())
    curvature = torch.zeros_like(gradient)
    for _ in range(draws or DRAWS):
        drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(logits.device)
        curvature += gate_gradients(nn.functional.cross_entropy(logits, drawn, reduction="sum")).square()
    return BatchStatistics(losses.detach(), gradient, curvature / (draws or DRAWS))


def sample_stride(dx: torch.Tensor | None, samples: int, channels_second: bool) -> int:
    """Rows of a consumer's input, all axes but the channels flattened, between one sample and the next.

    Args: dx: gradient of the first sample's logits in that input: it is zero in the other samples' rows.
    Raises: InputError: the rows hold the samples neither one after the other nor in turn, or samples mix.
    """
    if dx is None or channels_second:
        return 1
    rows = dx.flatten(0, -2).ne(0).any(1)
    for stride in (len(rows) // samples, 1):
        if stride * samples <= len(rows) and not rows.reshape(-1, samples, stride)[:, 1:].any():
            return stride
    raise InputError(
        "gates cannot be measured: samples of a batch influence one another, or are not along an outer axis"
    )
