"""Gates: one scalar z_c a channel group, 1 in the full model; first and second derivatives of the loss in them.

The gate of a group multiplies what the group's *consumers* read: the inputs of the convolutions and matrix products
that contract its channels. Every path from the group to the loss passes a consumer, so z_c = 0 is exactly the model
without the group, also through depthwise convolutions, normalisation and residual additions. With consumer input `a`
and the gradient `da` through that consumer alone, the gate's gradient for sample b is `sum over positions and
consumers of a * da`: no per-sample weight gradients are needed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from cahfp_cli.coupling.groups import KEPT, ChannelGroups
from cahfp_cli.coupling.slicing import tensors_of
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


@dataclass(frozen=True)
class Consumer:
    """Where a parameter contracts channels: the group of each entry of the contracted axis, KEPT for none."""

    name: str
    groups: torch.Tensor


CHANNELS_SECOND = frozenset(
    {torch.conv1d, torch.conv2d, torch.conv3d}
    | {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}
)
"""Operators whose input has its channels in axis 1; the others have them last."""

INPUT_POSITION: dict[Callable[..., Any], tuple[int, int]] = {
    **dict.fromkeys(CHANNELS_SECOND, (0, 1)),
    nn.functional.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.mm: (0, 1),
    torch.matmul: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.mm: (0, 1),
    torch.Tensor.addmm: (1, 2),
    torch.Tensor.__matmul__: (0, 1),
}
"""Where a contracting function takes its input and its weight."""


class ConsumerInputs(TorchFunctionMode):
    """Collects the input of every consumer while a model runs."""

    def __init__(self, consumers: Mapping[int, Consumer]) -> None:
        super().__init__()
        self.consumers = consumers
        self.seen: list[tuple[Consumer, torch.Tensor, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in INPUT_POSITION:
            x, weight = (argument(args, kwargs, i) for i in INPUT_POSITION[func])
            consumer = self.consumers.get(id(whole(weight)))
            if consumer is not None:
                # A tensor of its own: nothing flows through it but what this consumer reads.
                watched = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
                args = tuple(watched if value is x else value for value in args)
                kwargs = {name: watched if value is x else value for name, value in kwargs.items()}
                x = watched
                self.seen.append((consumer, x, func in CHANNELS_SECOND))
        return func(*args, **kwargs)


def whole(weight: Any) -> Any:
    """The parameter of which a weight is a view with all entries, as `w.t()` is; else the weight itself."""
    base = getattr(weight, "_base", None)
    return base if base is not None and base.numel() == weight.numel() else weight


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int) -> Any:
    """A positional argument, or the one of the same place among keywords (input, weight)."""
    if position < len(args):
        return args[position]
    names = ("mat1", "mat2") if "mat1" in kwargs else ("input", "weight")
    return kwargs.get(names[min(position, 1)])


def find_consumers(model: nn.Module, groups: ChannelGroups) -> dict[int, Consumer]:
    """The consumers of prunable channels by the identity of their parameter."""
    tensors = tensors_of(model)
    found = {}
    for name, axis in groups.consumers:
        labels = groups.labels[name][axis]
        if (labels != KEPT).any():
            found[id(tensors[name])] = Consumer(name, torch.from_numpy(labels).to(tensors[name].device))
    return found


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
    consumers = find_consumers(model, groups)
    model.eval()
    totals = np.zeros((4, groups.count))
    loss = 0.0
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, len(x), batch_size):
        samples = torch.from_numpy(x[first : first + batch_size]).to(device)
        labels = torch.from_numpy(y[first : first + batch_size]).to(device)
        batch = measure_batch(model, consumers, groups.count, samples, labels, draws, generator)
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
    consumers: Mapping[int, Consumer],
    groups: int,
    samples: torch.Tensor,
    labels: torch.Tensor,
    draws: int | None,
    generator: torch.Generator,
) -> BatchStatistics:
    """One forward pass, then one backward pass a class or a draw; weights get no gradients."""
    collector = ConsumerInputs(consumers)
    with torch.enable_grad(), collector:
        logits = logits_of(model(samples))
    missing = {c.name for c in consumers.values()} - {c.name for c, _, _ in collector.seen}
    if missing:
        raise InputError(f"gates of {sorted(missing)[0]} cannot be measured: its product is hidden from the tracer")
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    inputs = [x for _, x, _ in collector.seen]
    if not inputs or not torch.isfinite(losses).all():  # nothing to measure, or nothing that the caller accepts
        nothing = logits.new_zeros(len(samples), groups)
        return BatchStatistics(losses.detach(), nothing, nothing)

    def backward(output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients in what the consumers read, None where `output` does not depend on it."""
        return torch.autograd.grad(output, inputs, retain_graph=True, allow_unused=True)

    several_rows = any(not second and x.shape[:-1].numel() > len(samples) for _, x, second in collector.seen)
    of_first = backward(logits[0].square().sum()) if several_rows else (None,) * len(inputs)
    seconds = [second for _, _, second in collector.seen]
    strides = [sample_stride(dx, len(samples), second) for dx, second in zip(of_first, seconds, strict=True)]

    def gate_gradients(output: torch.Tensor) -> torch.Tensor:
        """d output / d gate for each sample, (b, groups); `output` is a sum over samples."""
        gradients = backward(output)
        total = logits.new_zeros(len(samples), groups + 1)
        for (consumer, x, channels_second), dx, stride in zip(collector.seen, gradients, strides, strict=True):
            if dx is None:  # read by something that the logits do not depend on
                continue
            product = x.detach() * dx
            by_position = product.flatten(2).sum(2) if channels_second else product.flatten(0, -2)
            channels = by_position.shape[1]
            by_channel = by_position.reshape(-1, len(samples), stride, channels).sum((0, 2))
            repeats = channels // len(consumer.groups)  # a grouped convolution reads each position once a group
            entries = consumer.groups.repeat(repeats)
            total.index_add_(1, torch.where(entries == KEPT, groups, entries), by_channel)
        return total[:, :groups]

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
