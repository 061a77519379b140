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

from cahfp_cli.coupling.groups import KEPT, ChannelGroups, Consumer
from cahfp_cli.errors import InputError
from cahfp_cli.models.undisturbed import undisturbed
from cahfp_cli.running.logits import class_rows, run_network
from cahfp_cli.significance.consumers import ConsumerInputs, Reach, logits_without

EXACT_CLASSES = 16
"""Up to so many classes every one has its backward pass unless the caller says otherwise; beyond, the likeliest."""
TOP_CLASSES = 3


class RowsError(InputError):
    """The rows of what a consumer reads hold the samples neither one after the other nor in turn, or samples mix."""


class GatedPass:
    """One forward pass of a model over a batch, from which the gates' gradients of any output can be taken.

    Consumers that gradients do not reach have differences in their place: what the logits lose without a group, which
    is the derivative of the line through both.

    logits: (b, classes), float32 or wider, with the graph behind them.
    """

    def __init__(
        self, model: nn.Module, groups: ChannelGroups, samples: torch.Tensor, reach: Reach | None = None
    ) -> None:
        """Run the model, which must be in evaluation mode and on the samples' device.

        Args: reach: how it can be measured, from reach.py; one sample at a time if that says so.
        Raises: InputError: a consumer was not seen, or the model gives no logits.
        """
        self._model, self._groups, self._samples = model, groups, samples
        self._reach = reach or Reach()
        collector = ConsumerInputs(groups)
        with torch.enable_grad():
            self.logits = collector.run(model, samples, self._reach.lifted)
        if not self.logits.requires_grad:  # nothing before it has a gradient; itself it must
            self.logits = self.logits.detach().requires_grad_()
        self._seen = [one for one in collector.seen if one[0].call not in self._reach.unreached]
        self._inputs = [x for _, x, _ in self._seen]
        numbers = [np.where(c.groups == KEPT, groups.count, c.groups) for c, _, _ in self._seen]
        self._numbers = [torch.from_numpy(number).to(self.logits.device) for number in numbers]

    @cached_property
    def strides(self) -> list[int]:
        """Rows between samples in what each consumer reads; found when first needed: it takes finite logits.

        Raises: RowsError: there is no such number.
        """
        samples = len(self.logits)
        if samples == 1:
            return [1] * len(self._seen)
        rows = [x.shape[0] if axis == 1 else x.shape[:-1].numel() for _, x, axis in self._seen]
        several_rows = any(count != samples for count in rows)
        of_first = self._backward(self.logits[0].square().sum()) if several_rows else (None,) * len(self._inputs)
        return [sample_stride(dx, samples, axis) for dx, (_, _, axis) in zip(of_first, self._seen, strict=True)]

    def _backward(self, output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients in what the consumers read, None where `output` does not depend on it."""
        if not self._inputs:
            return ()
        return torch.autograd.grad(output, self._inputs, retain_graph=True, allow_unused=True)

    def reached(self) -> Iterator[tuple[Consumer, bool]]:
        """The consumers, and whether the logits have a gradient in what each reads that is not zero."""
        weights = torch.arange(1, self.logits.shape[1] + 1, device=self.logits.device)
        gradients = self._backward((self.logits * weights).sum())
        for (consumer, _, _), dx in zip(self._seen, gradients, strict=True):
            yield consumer, dx is not None and bool(dx.any())

    def gradients(self, output: torch.Tensor) -> torch.Tensor:
        """d output / d gate for each sample, (b, groups); `output` is a sum over samples of functions of `logits`."""
        samples = len(self.logits)
        total = self.logits.new_zeros(samples, self._groups.count + 1)
        for (_, x, axis), dx, stride, number in zip(
            self._seen, self._backward(output), self.strides, self._numbers, strict=True
        ):
            if dx is None:  # read by something that the logits do not depend on
                continue
            wide = torch.promote_types(x.dtype, total.dtype)
            by_position = by_row(x.detach().to(wide) * dx.to(wide), axis)
            by_channel = by_position.reshape(-1, samples, stride, by_position.shape[1]).sum((0, 2))
            total.index_add_(1, number, by_channel.to(total.dtype))
        if self._reach.unreached:
            (of_logits,) = torch.autograd.grad(output, self.logits, retain_graph=True)
            total[:, self._unreached] += torch.einsum("bk,bkg->bg", of_logits, self._differences)
        return total[:, : self._groups.count]

    @cached_property
    def _unreached(self) -> torch.Tensor:
        """The groups that some consumer without gradients reads, int64."""
        read = [consumer.groups for consumer in self._groups.consumers if consumer.call in self._reach.unreached]
        return torch.from_numpy(np.setdiff1d(np.concatenate(read), KEPT)).to(self.logits.device)

    @cached_property
    def _differences(self) -> torch.Tensor:
        """What the logits lose without each group of `_unreached` in the consumers that gradients do not reach,
        (b, classes, unreached groups): a forward pass each."""
        consumers = [consumer for consumer in self._groups.consumers if consumer.call in self._reach.unreached]
        whole = logits_without(self._model, self._groups, self._samples, {})
        lost = self.logits.new_empty(*whole.shape, len(self._unreached))
        for position, group in enumerate(self._unreached.tolist()):
            channels = {c.call: torch.from_numpy(np.flatnonzero(c.groups == group)) for c in consumers}
            lost[:, :, position] = whole - logits_without(self._model, self._groups, self._samples, channels)
        return lost


def by_row(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Values that a consumer reads, (rows, channels): all axes but that of the channels flattened, where they are the
    last; where they are the second, the first with all axes after them summed up."""
    return values.flatten(2).sum(2) if axis == 1 else values.reshape(-1, values.shape[-1])


def sample_stride(dx: torch.Tensor | None, samples: int, axis: int) -> int:
    """Rows of a consumer's input, see `by_row`, between one sample and the next.

    Args: dx: gradient of the first sample's logits in that input: it is zero in the other samples' rows.
    Raises: RowsError: the rows hold the samples neither one after the other nor in turn, or samples mix.
    """
    if dx is None:
        return 1
    rows = by_row(dx.ne(0).float(), axis).any(1)
    for stride in (len(rows) // samples, 1) if len(rows) % samples == 0 else ():
        if stride > 0 and not rows.reshape(-1, samples, stride)[:, 1:].any():
            return stride
    raise RowsError(
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


def check_labels(labels: torch.Tensor, logits: torch.Tensor) -> None:
    """Raises: InputError: the network has fewer outputs than a label, int64 (b,), says."""
    if len(labels) and int(labels.max()) >= logits.shape[1]:
        raise InputError(
            f"the data has label {int(labels.max())}, but the network gives {logits.shape[1]} logits, for labels from "
            f"0 to {logits.shape[1] - 1}: use the data that the network was made for."
        )


def batches_of(x: NDArray[Any], batch_size: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """Samples in order, in batches, with the number of each batch's first sample."""
    for first in range(0, len(x), batch_size):
        yield first, torch.from_numpy(x[first : first + batch_size]).to(device)


@torch.no_grad()
def predict(model: nn.Module, samples: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Logits (n, classes) of a model in evaluation mode, float32 or wider.

    Raises: InputError: it fails on the samples, or does not give one row of logits a sample.
    """
    batches = torch.split(samples, batch_size)
    with undisturbed(model):
        return torch.cat([class_rows(run_network(model, batch), len(batch)) for batch in batches])


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
    reach: Reach | None = None,
) -> GateJacobian:
    """The Jacobian of logits in all gates over a whole calibration set.

    A class that matters to no sample of a batch needs no backward pass: samples are batched by how many matter to them.

    Args:
        model: in evaluation mode, left as it is. samples: on its device.
        classes: int64 (n, m), the classes to look at. logits: (n, m), the model's own, of these classes.
        relevance: (n, m), how much each class matters, beside the model's own prediction of it.
        threshold: a class below that in both is not looked at; its logit is taken to move as the mean of the others.
        reach: how the gates can be measured, see reach.py.
    Returns: tensors on that device; memory is n x m x groups numbers.
    Raises: InputError: the gates cannot be measured, or a derivative is not finite.
    """
    if not torch.isfinite(logits).all():
        raise InputError("the network gives NaN or Inf on the calibration data: check the data and the weights")
    weight = torch.maximum(logits.softmax(1), relevance)
    by_weight = weight.argsort(dim=1, descending=True, stable=True)
    needed = (weight > threshold).sum(1).clamp_min(min(2, classes.shape[1]))
    jacobian = logits.new_zeros(*classes.shape, groups.count)
    at_once = 1 if reach is not None and reach.alone else batch_size
    for rows in torch.split(needed.argsort(dim=0, stable=True), at_once):
        columns = by_weight[rows, : int(needed[rows].max())]
        own = jacobian_of(GatedPass(model, groups, samples[rows], reach), classes[rows].gather(1, columns))
        share = logits[rows].gather(1, columns).softmax(1)
        jacobian[rows] = torch.einsum("bk,bkg->bg", share, own)[:, None]
        jacobian[rows[:, None], columns] = own
    if not torch.isfinite(jacobian).all():
        raise InputError("a derivative on the calibration data is NaN or Inf: check the data and the weights")
    return GateJacobian(logits, jacobian)
