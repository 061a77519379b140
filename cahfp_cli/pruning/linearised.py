"""What removing sets of groups is predicted to cost, in nats, as groups are taken out one after the other.

The cost is the divergence from a reference P (the full network's predictions, or the labels): KL(P, q), mean over
calibration samples. Two models of it:

- `Linearised`: the logits to first order in the gates, f - sum of removed J, and the softmax of those as it is.
- `Quadratic`: to second order, -sum g_c + 1/2 sum G_cc' over the removed set, from the interactions of a scores file.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from cahfp_cli.significance.divergence import divergence
from cahfp_cli.significance.gates import GateJacobian


class Removal(Protocol):
    """A set of groups that grows. alive: boolean (groups,), those not removed."""

    alive: torch.Tensor

    def estimate(self) -> torch.Tensor:
        """Change of the divergence for removing each group next, to second order, (groups,), nats."""

    def together(self, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        """The same as this model predicts it, for removing all groups of each block next: (blocks,). A block: int64,
        numbers of some groups that are left."""

    def remove(self, group: int) -> None:
        """Take a group out."""

    def restore(self, group: int) -> None:
        """Put a removed group back."""

    def divergence(self) -> float:
        """Predicted divergence at the groups removed so far, nats."""


class Linearised:
    """Removal on linearised logits.

    reference: (n, m), each row sums to 1. jacobian: (groups, n x m), a row a group. logits, probabilities: (n, m), at
    the groups removed so far.
    """

    def __init__(self, found: GateJacobian, reference: torch.Tensor) -> None:
        """Args: found: at the current network; reference: (n, m), of the same classes."""
        samples, classes, groups = found.jacobian.shape
        self.reference = reference
        self.jacobian = found.jacobian.reshape(samples * classes, groups).T.contiguous()
        self.alive = torch.ones(groups, dtype=torch.bool, device=reference.device)
        self.recentre(found.logits)
        self._curvature = self.curvature()

    def recentre(self, logits: torch.Tensor) -> None:
        """Take measured logits (n, m) for the predicted ones."""
        self.logits, self.probabilities = logits, logits.softmax(1)

    def curvature(self) -> torch.Tensor:
        """Diagonal of the Gauss-Newton matrix at the current probabilities, (groups,)."""
        samples, classes = self.probabilities.shape
        q = self.probabilities.flatten()
        mean = (self.jacobian * q).reshape(-1, samples, classes).sum(2)
        return (self.jacobian.square() @ q - mean.square().sum(1)) / samples

    def contributions(self) -> torch.Tensor:
        """What each sample adds to the sum of the curvature of all groups, (n,)."""
        q = self.probabilities
        jacobian = self.jacobian.reshape(-1, *q.shape)
        return ((jacobian.square() * q).sum(2) - (jacobian * q).sum(2).square()).sum(0)

    def estimate(self) -> torch.Tensor:
        """As `Removal.estimate`; the curvature is that of the network before any removal."""
        gradient = self.jacobian @ (self.reference - self.probabilities).flatten() / len(self.reference)
        return gradient + 0.5 * self._curvature

    def together(self, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        """As `Removal.together`, by the softmax of the linearised logits."""
        moved = block_sums(self.jacobian, blocks).reshape(-1, *self.logits.shape)
        shifted = (self.logits - moved).logsumexp(2) - self.logits.logsumexp(1)
        return ((self.reference * moved).sum(2) + shifted).mean(1)

    def remove(self, group: int) -> None:
        """As `Removal.remove`."""
        self.alive[group] = False
        self.recentre(self.logits - self.jacobian[group].reshape(self.logits.shape))

    def restore(self, group: int) -> None:
        """As `Removal.restore`."""
        self.alive[group] = True
        self.recentre(self.logits + self.jacobian[group].reshape(self.logits.shape))

    def divergence(self) -> float:
        """As `Removal.divergence`."""
        return divergence(self.reference, self.logits)


class Quadratic:
    """Removal on the quadratic form: -sum g + 1/2 d' G d with G = interactions' interactions."""

    def __init__(self, interactions: torch.Tensor, gradient: torch.Tensor, start: float = 0.0) -> None:
        """Args: interactions: (rows, groups); gradient: (groups,), of the divergence in the gates; start: nats."""
        self._columns = interactions.T.contiguous()
        self._diagonal = self._columns.square().sum(1)
        self._slope = -gradient
        self._divergence = start
        self.alive = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device)

    @classmethod
    def of(cls, linearised: Linearised) -> "Quadratic":
        """The second-order expansion of a linearised network, before any removal."""
        samples, classes = linearised.probabilities.shape
        q = linearised.probabilities
        jacobian = linearised.jacobian.reshape(-1, samples, classes)
        centred = jacobian - (jacobian * q).sum(2, keepdim=True)
        rows = (centred * (q / samples).sqrt()).flatten(1).T
        gradient = linearised.jacobian @ (q - linearised.reference).flatten() / samples
        return cls(rows, gradient, linearised.divergence())

    def estimate(self) -> torch.Tensor:
        """As `Removal.estimate`."""
        return self._slope + 0.5 * self._diagonal

    def together(self, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        """As `Removal.together`."""
        slope = block_sums(self._slope[:, None], blocks)[:, 0]
        return slope + 0.5 * block_sums(self._columns, blocks).square().sum(1)

    def remove(self, group: int) -> None:
        """As `Removal.remove`: what is left interacts with what went."""
        self._divergence += float(self._slope[group] + 0.5 * self._diagonal[group])
        self._slope = self._slope + self._columns @ self._columns[group]
        self.alive[group] = False

    def restore(self, group: int) -> None:
        """As `Removal.restore`."""
        self._slope = self._slope - self._columns @ self._columns[group]
        self._divergence -= float(self._slope[group] + 0.5 * self._diagonal[group])
        self.alive[group] = True

    def divergence(self) -> float:
        """As `Removal.divergence`; it may be below 0, unlike what it approximates."""
        return self._divergence


def block_sums(rows: torch.Tensor, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of each block's rows, (blocks, columns); `rows`: (groups, columns)."""
    if all(len(block) == 1 for block in blocks):
        return rows[torch.cat(list(blocks))]
    return torch.stack([rows[block].sum(0) for block in blocks])
