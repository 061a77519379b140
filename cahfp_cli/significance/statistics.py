"""First and second derivatives of the loss in the gates, over calibration samples."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.coupling.groups import ChannelGroups
from cahfp_cli.errors import InputError
from cahfp_cli.significance.consumers import Reach
from cahfp_cli.significance.gates import GatedPass, batches_of, check_labels, classes_looked_at, jacobian_of
from cahfp_cli.significance.reach import find_reach

Floats = NDArray[np.float64]

INTERACTION_BYTES = 256_000_000
"""Interactions beyond this size are not kept: `cahfp prune --calibration` measures them anew instead."""


@dataclass(frozen=True)
class GateStatistics:
    """What calibration samples say of each gate; arrays are float64 (groups,) unless said otherwise.

    gradient: dL/dz of the mean cross-entropy, nats. gradient_error: its standard error over the samples.
    gradient_magnitude: mean of the absolute per-sample gradient.
    gradient_square: mean of the squared per-sample gradient (empirical Fisher diagonal).
    curvature: diagonal of the generalised Gauss-Newton matrix G = E[J' (diag p - p p') J].
    halves: float64 (2, groups), the curvature of the samples with even and with odd numbers.
    contributions: float64 (samples,), what each sample adds to the sum of the curvature of all groups.
    interactions: float32 (rows, groups) with G = interactions' interactions, None where that would be too large.
    samples: their number; loss: their mean cross-entropy, nats.
    accuracy: share of the samples that the network classifies rightly; chance: the share of the commonest label, which
        is right as often by itself. None where all labels are the same, as placeholders are.
    certainty: mean probability that the network gives to its likeliest class; None where it was not measured.
    """

    gradient: Floats
    gradient_error: Floats
    gradient_magnitude: Floats
    gradient_square: Floats
    curvature: Floats
    halves: Floats
    contributions: Floats
    interactions: NDArray[np.float32] | None
    samples: int
    loss: float
    accuracy: float | None = None
    chance: float | None = None
    certainty: float | None = None


@dataclass(frozen=True)
class Batch:
    """Results for each sample: logits (b, classes), losses (b,), loss gradients (b, groups), and rows (b, m, groups) of
    which the squares sum up to the curvature over m, and the products to the Gauss-Newton matrix."""

    logits: torch.Tensor
    losses: torch.Tensor
    gradient: torch.Tensor
    rows: torch.Tensor


def gate_statistics(
    model: nn.Module,
    groups: ChannelGroups,
    x: NDArray[Any],
    y: NDArray[np.int64],
    *,
    batch_size: int = 64,
    top: int | None = None,
    draws: int | None = None,
    interactions: bool = True,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> GateStatistics:
    """Measure gradients and curvature of every gate over calibration samples.

    Memory beside the network's own is that of a batch, batch_size x classes x groups numbers, and of the interactions.

    Args:
        model: left as it is; runs in evaluation mode on the device of its parameters.
        groups: its channel groups.
        x: samples, float32 (n, ...) or integer tokens; y: labels, int64 (n,).
        top: look at so many of the likeliest classes of each sample; without it at all of them up to 16, and at 3
            beyond. A backward pass each.
        draws: instead, so many labels drawn from the model's own predictions for each sample, an unbiased estimate
            (the true Fisher equals the GGN for a softmax likelihood). A backward pass each.
        interactions: whether to keep the off-diagonal of G.
    Raises:
        InputError: a sample gave a non-finite output or gradient (its number is named), or a consumer was not seen.
    """
    device = next(model.parameters()).device
    model.eval()
    total = Totals(groups.count, y, interactions)
    generator = torch.Generator().manual_seed(seed)
    reach = find_reach(model, groups, torch.from_numpy(x), batch_size)
    for first, samples in batches_of(x, 1 if reach.alone else batch_size, device):
        labels = torch.from_numpy(y[first : first + len(samples)]).to(device)
        batch = measure_batch(model, groups, samples, labels, reach, top, draws, generator)
        bad = ~torch.isfinite(batch.losses) | ~torch.isfinite(batch.gradient).all(1)
        bad |= ~torch.isfinite(batch.rows).flatten(1).all(1)
        if bad.any():
            number = first + int(torch.nonzero(bad)[0])
            raise InputError(
                f"calibration sample {number} gives a non-finite loss or gradient: check it and the weights"
            )
        total.add(first, batch)
        on_progress(first + len(samples), len(x))
    return total.statistics()


def measure_batch(
    model: nn.Module,
    groups: ChannelGroups,
    samples: torch.Tensor,
    labels: torch.Tensor,
    reach: Reach,
    top: int | None,
    draws: int | None,
    generator: torch.Generator,
) -> Batch:
    """One forward pass, then one backward pass a class or a draw; weights get no gradients."""
    gated = GatedPass(model, groups, samples, reach)
    check_labels(labels, gated.logits)
    losses = nn.functional.cross_entropy(gated.logits, labels, reduction="none")
    if groups.count == 0 or not torch.isfinite(losses).all():  # nothing to measure, or nothing the caller accepts
        nothing = gated.logits.new_zeros(len(samples), 1, groups.count)
        return Batch(gated.logits.detach(), losses.detach(), nothing[:, 0], nothing)
    if draws is not None:
        rows = torch.stack(list(drawn_gradients(gated, draws, generator)), 1) / draws**0.5
        return Batch(gated.logits.detach(), losses.detach(), gated.gradients(losses.sum()), rows)
    classes = classes_looked_at(gated.logits, top)
    jacobian = jacobian_of(gated, classes)
    p = gated.logits.detach().gather(1, classes).softmax(1)
    mean = torch.einsum("bk,bkg->bg", p, jacobian)
    if classes.shape[1] == gated.logits.shape[1]:  # every class has its pass, so the label's is among them
        gradient = mean - jacobian[torch.arange(len(labels)), labels]
    else:
        gradient = gated.gradients(losses.sum())
    rows = p.sqrt()[:, :, None] * (jacobian - mean[:, None])
    return Batch(gated.logits.detach(), losses.detach(), gradient, rows)


def drawn_gradients(gated: GatedPass, draws: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Loss gradients in the gates for labels drawn from the model's own predictions, each (b, groups)."""
    probabilities = gated.logits.detach().softmax(1).cpu()
    for _ in range(draws):
        drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(gated.logits.device)
        yield gated.gradients(nn.functional.cross_entropy(gated.logits, drawn, reduction="sum"))


class Totals:
    """Sums over the batches, in float64 on the CPU (not every device has float64)."""

    def __init__(self, groups: int, labels: NDArray[np.int64], interactions: bool) -> None:
        samples = len(labels)
        self._labels = labels
        self._right = np.zeros(samples, dtype=bool)
        self._certainty = np.zeros(samples)
        self._sums = np.zeros((3, groups))
        self._halves = np.zeros((2, groups))
        self._contributions = np.zeros(samples)
        self._loss = 0.0
        self._keep = interactions
        self._rows: list[NDArray[np.float32]] = []

    def add(self, first: int, batch: Batch) -> None:
        """Take in the batch whose first sample has that number."""
        gradient = batch.gradient.cpu().double().numpy()
        squares = batch.rows.square().sum(1).cpu().double().numpy()
        numbers = np.arange(first, first + len(squares))
        self._sums += np.stack([gradient.sum(0), np.abs(gradient).sum(0), np.square(gradient).sum(0)])
        for half in range(2):
            self._halves[half] += squares[numbers % 2 == half].sum(0)
        self._contributions[numbers] = squares.sum(1)
        self._loss += float(batch.losses.cpu().double().sum())
        self._right[numbers] = batch.logits.argmax(1).cpu().numpy() == self._labels[numbers]
        self._certainty[numbers] = batch.logits.softmax(1).amax(1).cpu().double().numpy()
        if self._keep:
            self._rows.append(batch.rows.flatten(0, 1).cpu().float().numpy())
            self._keep = self._shrink()
            if not self._keep:
                self._rows.clear()

    def _shrink(self) -> bool:
        """Reduce the rows to as many as there are groups: those of R in rows = Q R have the same products. Whether what
        is left is small enough to be kept."""
        groups = self._sums.shape[1]
        count = sum(map(len, self._rows))
        if count > 4 * groups > 0:
            self._rows = [triangle(np.concatenate(self._rows))]
        return sum(rows.nbytes for rows in self._rows) <= INTERACTION_BYTES

    def statistics(self) -> GateStatistics:
        """What all batches together say."""
        samples = len(self._contributions)
        gradient, magnitude, square = self._sums / samples
        halves = self._halves / np.array([[(samples + 1) // 2], [max(samples // 2, 1)]])
        variance = np.maximum(square - gradient**2, 0.0)
        interactions = None
        if self._keep and self._rows:
            rows = np.concatenate(self._rows)
            if len(rows) > rows.shape[1] > 0:
                rows = triangle(rows)
            interactions = np.ascontiguousarray(rows / np.float32(samples) ** 0.5, dtype=np.float32)
        return GateStatistics(
            gradient=gradient,
            gradient_error=np.sqrt(variance / max(samples - 1, 1)),
            gradient_magnitude=magnitude,
            gradient_square=square,
            curvature=self._halves.sum(0) / samples,
            halves=halves,
            contributions=self._contributions,
            interactions=interactions,
            samples=samples,
            loss=self._loss / samples,
            accuracy=float(self._right.mean()) if np.ptp(self._labels) else None,
            chance=float(np.bincount(self._labels).max() / samples) if np.ptp(self._labels) else None,
            certainty=float(self._certainty.mean()),
        )


def triangle(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """R of rows = Q R, (groups, groups): its columns have the same products as those of rows."""
    # Not NumPy's: that takes twenty times as long, and as many threads as it likes.
    return np.asarray(torch.linalg.qr(torch.from_numpy(np.ascontiguousarray(rows)), mode="r").R.numpy())
