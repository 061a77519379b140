"""The terms of the convergence bound (docs/explanation/federation.md), measured at the global network w of a round.

With F_k the mean loss of client k over all its samples, p_k its share of everybody's samples, F = sum_k p_k F_k, and
q_k the share of client k among those whose replies were merged:

    gradient       |grad F(w)|^2, which the others bound
    optimisation   (F(w) - F(w')) / (eta E), w' the network after the round; its mean over T rounds is
                   (F(w_0) - F(w_T)) / (eta E T)
    noise          s^2 = sum_k p_k sum_b (n_b / n_k) |grad F_kb(w) - grad F_k(w)|^2, over the batches b of an epoch
    dissimilarity  zeta^2 = sum_k p_k |grad F_k(w) - grad F(w)|^2
    pruning        sum_k q_k |grad F_k(w) - grad F_k(m_k . w)|^2
    uncovered      |grad F(w)|^2 on the coordinates that no merged client holds

eta is the learning rate and E the mean number of local steps; momentum is left out of account. Constants, and L, which
nobody knows, are not in the figures. Losses are those in evaluation mode, so that they are functions of w alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.data.batches import batches
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.federation.client import CPU
from cahfp_cli.formats.axes import Indices, selector
from cahfp_cli.models.undisturbed import undisturbed
from cahfp_cli.running.logits import backward, class_logits

Floats = NDArray[np.float64]
Gradients = Mapping[str, Floats]
"""By the names of parameters, float64 of their shapes."""
Axes = Mapping[str, tuple[Indices | None, ...]]
"""Which entries of every tensor a submodel holds, as an index map has them."""


@dataclass(frozen=True)
class Terms:
    """See above. loss: F(w), in nats."""

    loss: float
    gradient: float
    optimisation: float
    noise: float
    dissimilarity: float
    pruning: float
    uncovered: float


@dataclass(frozen=True)
class Part:
    """A client's submodel, m_k . w without what is cut away, and how many steps of training it makes in a round."""

    submodel: nn.Module
    axes: Axes
    steps: int


@dataclass(frozen=True)
class Measured:
    """Of one data set: mean loss, its gradient, and the variance of the gradients of batches."""

    loss: float
    gradient: Gradients
    noise: float


def terms(
    network: nn.Module, data: Mapping[int, Dataset], merged: Mapping[int, Part], after: nn.Module, lr: float, size: int
) -> Terms:
    """Measure all terms.

    Args:
        network: w, in evaluation mode; after: w', likewise. data: of every client. merged: those whose replies were.
        lr: eta. size: samples a batch.
    Raises: InputError: the data does not fit the network.
    """
    everybody = sum(map(len, data.values()))
    taking_part = sum(len(data[client]) for client in merged)
    mean = {name: np.zeros(tuple(p.shape)) for name, p in network.named_parameters()}
    loss = loss_after = noise = squares = pruning = 0.0
    for client, own in data.items():
        share = len(own) / everybody
        found = measured(network, own, size)
        loss += share * found.loss
        loss_after += share * mean_loss(after, own, size)
        noise += share * found.noise
        squares += share * square(found.gradient)
        for name, gradient in found.gradient.items():
            mean[name] += share * gradient
        if client in merged:
            part = merged[client]
            cut = measured(part.submodel, own, size).gradient
            pruning += len(own) / taking_part * square(dict(differences(found.gradient, cut, part.axes)))
    steps = sum(len(data[client]) / taking_part * part.steps for client, part in merged.items())
    return Terms(
        loss=loss,
        gradient=square(mean),
        optimisation=(loss - loss_after) / (lr * steps) if merged else 0.0,
        noise=noise,
        dissimilarity=max(0.0, squares - square(mean)),
        pruning=pruning,
        uncovered=square(dict(uncovered(mean, [part.axes for part in merged.values()]))),
    )


def measured(network: nn.Module, data: Dataset, size: int) -> Measured:
    """One pass over the data, shuffled as is an epoch, in batches of `size`."""
    total = {name: np.zeros(tuple(p.shape)) for name, p in network.named_parameters()}
    loss = squares = 0.0
    for x, y in batches(data, size, seed=0):
        share = len(y) / len(data)
        value = batch_loss(network, x, y, data.classes)
        parameters = dict(network.named_parameters())
        with backward():
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        own = {n: g.double().numpy() for n, g in zip(parameters, gradients, strict=True) if g is not None}
        loss += share * float(value.detach())
        squares += share * square(own)
        for name, gradient in own.items():
            total[name] += share * gradient
    return Measured(loss, total, max(0.0, squares - square(total)))


def mean_loss(network: nn.Module, data: Dataset, size: int) -> float:
    """In nats."""
    with undisturbed(network), torch.inference_mode():
        return sum(
            len(y) / len(data) * float(batch_loss(network, x, y, data.classes)) for x, y in batches(data, size, seed=0)
        )


def batch_loss(network: nn.Module, x: Array, y: Array, classes: int) -> torch.Tensor:
    return F.cross_entropy(class_logits(network, x, classes, CPU), torch.from_numpy(y))


def square(gradients: Gradients) -> float:
    """Squared norm over all tensors."""
    return float(sum(np.vdot(one, one) for one in gradients.values()))


def differences(whole: Gradients, cut: Gradients, axes: Axes) -> Iterator[tuple[str, Floats]]:
    """grad F(w) - grad F(m . w). The submodel's gradient is the latter: where all entries of a group are 0, nothing
    passes through it, so that its own gradients are 0 as well. Where removing is not zeroing, as with norms over a
    pruned axis, it is the submodel that counts."""
    for name, gradient in whole.items():
        difference = gradient.copy()
        difference[selector(axes[name], gradient.shape)] -= cut[name]
        yield name, difference


def uncovered(gradients: Gradients, holders: list[Axes]) -> Iterator[tuple[str, Floats]]:
    """The gradients, with 0 where any of the holders has the coordinate."""
    for name, gradient in gradients.items():
        left = gradient.copy()
        for axes in holders:
            left[selector(axes[name], gradient.shape)] = 0.0
        yield name, left
