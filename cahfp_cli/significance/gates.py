"""Gates: one scalar z_c a channel group, 1 in the full model, and the derivatives of the logits in them.

The gate of a group multiplies what the group's *consumers* read: the inputs of the convolutions and matrix products
that contract its channels. Every path from the group to the loss passes a consumer, so z_c = 0 is exactly the model
without the group, also through depthwise convolutions, normalisation and residual additions. With consumer input `a`
and the gradient `da` through that consumer alone, the gate's gradient for sample b is `sum over positions and
consumers of a * da`: no per-sample weight gradients are needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
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

EXACT_CLASSES = 16
"""Up to so many classes every one has its backward pass unless the caller says otherwise; beyond, the likeliest."""
TOP_CLASSES = 3


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


class GatedPass:
    """One forward pass of a model over a batch, from which the gates' gradients of any output can be taken.

    logits: (b, classes), with the graph behind them.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups, samples: torch.Tensor) -> None:
        """Run the model, which must be in evaluation mode and on the samples' device.

        Raises: InputError: a consumer was not seen, or the samples of a batch influence one another.
        """
        collector = ConsumerInputs(groups)
        with torch.enable_grad(), collector:
            self.logits = logits_of(model(samples))
        if len(collector.seen) < len(collector.consumers):
            raise InputError("gates cannot be measured: the model runs fewer products than when it was traced")
        self._groups = groups.count
        self._seen = collector.seen
        self._inputs = [x for _, x, _ in collector.seen]
        numbers = [np.where(c.groups == KEPT, groups.count, c.groups) for c, _, _ in collector.seen]
        self._numbers = [torch.from_numpy(number).to(self.logits.device) for number in numbers]

    @cached_property
    def _strides(self) -> list[int]:
        """Rows between samples in what each consumer reads; found when first needed: it takes finite logits."""
        several_rows = any(axis < 0 and x.shape[:-1].numel() > len(self.logits) for _, x, axis in self._seen)
        of_first = self._backward(self.logits[0].square().sum()) if several_rows else (None,) * len(self._inputs)
        return [
            sample_stride(dx, len(self.logits), axis == 1)
            for dx, (_, _, axis) in zip(of_first, self._seen, strict=True)
        ]

    def _backward(self, output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients in what the consumers read, None where `output` does not depend on it."""
        if not self._inputs:
            return ()
        return torch.autograd.grad(output, self._inputs, retain_graph=True, allow_unused=True)

    def gradients(self, output: torch.Tensor) -> torch.Tensor:
        """d output / d gate for each sample, (b, groups); `output` is a sum over samples of functions of `logits`."""
        samples = len(self.logits)
        total = self.logits.new_zeros(samples, self._groups + 1)
        for (_, x, axis), dx, stride, number in zip(
            self._seen, self._backward(output), self._strides, self._numbers, strict=True
        ):
            if dx is None:  # read by something that the logits do not depend on
                continue
            product = x.detach() * dx
            by_position = product.flatten(2).sum(2) if axis == 1 else product.flatten(0, -2)
            channels = by_position.shape[1]
            by_channel = by_position.reshape(-1, samples, stride, channels).sum((0, 2))
            total.index_add_(1, number, by_channel)
        return total[:, : self._groups]


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


@dataclass(frozen=True)
class GateJacobian:
    """Some logits of each sample, (n, m), and their derivatives in all gates, (n, m, groups)."""

    logits: torch.Tensor
    jacobian: torch.Tensor


def classes_looked_at(logits: torch.Tensor, top: int | None) -> torch.Tensor:
    """The `top` likeliest classes of each sample, likeliest first, int64 (n, m); without `top`, all of them up to
    `EXACT_CLASSES`, and `TOP_CLASSES` beyond."""
    classes = logits.shape[1]
    count = top if top is not None else (classes if classes <= EXACT_CLASSES else TOP_CLASSES)
    if count >= classes:
        return torch.arange(classes, device=logits.device).expand(len(logits), -1)
    return logits.detach().topk(count, 1).indices


def jacobian_of(gated: GatedPass, classes: torch.Tensor) -> torch.Tensor:
    """Derivatives of each sample's logits of `classes`, int64 (b, m), in all gates: (b, m, groups), by one backward
    pass a column of `classes`."""
    columns = [gated.logits.gather(1, classes[:, k : k + 1]).sum() for k in range(classes.shape[1])]
    return torch.stack([gated.gradients(column) for column in columns], 1)


def batches_of(x: NDArray[Any], batch_size: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """Samples in order, in batches, with the number of each batch's first sample."""
    for first in range(0, len(x), batch_size):
        yield first, torch.from_numpy(x[first : first + batch_size]).to(device)


@torch.no_grad()
def predict(model: nn.Module, samples: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Logits (n, classes) of a model in evaluation mode."""
    return torch.cat([logits_of(model(batch)) for batch in torch.split(samples, batch_size)])


def gate_jacobian(
    model: nn.Module,
    groups: ChannelGroups,
    samples: torch.Tensor,
    classes: torch.Tensor,
    logits: torch.Tensor,
    *,
    relevance: torch.Tensor,
    threshold: float = 0.0,
    batch_size: int = 64,
) -> GateJacobian:
    """The Jacobian of logits in all gates over a whole calibration set.

    A class that matters to no sample of a batch needs no backward pass: samples are batched by how many matter to them.

    Args:
        model: in evaluation mode, left as it is. samples: on its device.
        classes: int64 (n, m), the classes to look at. logits: (n, m), the model's own, of these classes.
        relevance: (n, m), how much each class matters, beside the model's own prediction of it.
        threshold: a class below that in both is not looked at; its logit is taken to move as the mean of the others.
    Returns: tensors on that device; memory is n x m x groups numbers.
    Raises: InputError: the gates cannot be measured, or a derivative is not finite.
    """
    if not torch.isfinite(logits).all():
        raise InputError("the network gives NaN or Inf on the calibration data: check the data and the weights")
    weight = torch.maximum(logits.softmax(1), relevance)
    by_weight = weight.argsort(dim=1, descending=True, stable=True)
    needed = (weight > threshold).sum(1).clamp_min(min(2, classes.shape[1]))
    jacobian = logits.new_zeros(*classes.shape, groups.count)
    for rows in torch.split(needed.argsort(dim=0, stable=True), batch_size):
        columns = by_weight[rows, : int(needed[rows].max())]
        own = jacobian_of(GatedPass(model, groups, samples[rows]), classes[rows].gather(1, columns))
        share = logits[rows].gather(1, columns).softmax(1)
        jacobian[rows] = torch.einsum("bk,bkg->bg", share, own)[:, None]
        jacobian[rows[:, None], columns] = own
    if not torch.isfinite(jacobian).all():
        raise InputError("a derivative on the calibration data is NaN or Inf: check the data and the weights")
    return GateJacobian(logits, jacobian)
