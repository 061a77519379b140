"""Selection that sees the set: what a group is worth depends on the groups that went before it.

In each of several rounds the network, as it is by then, is linearised in its gates; groups are removed down to this
round's share of the budget; and the gates of the survivors are moved to take over what was removed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.coupling.analysis import Analysis, cut
from cahfp_cli.coupling.groups import ChannelGroups
from cahfp_cli.coupling.slicing import slice_module
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.device.cost import CostModel
from cahfp_cli.errors import InputError
from cahfp_cli.models.undisturbed import undisturbed
from cahfp_cli.pruning.budget import Budget, Limits, values_of
from cahfp_cli.pruning.compensation import DAMPING, FoldedWeights, Gates, compensated, foldable, gauss_newton
from cahfp_cli.pruning.greedy import remove_to_fit
from cahfp_cli.pruning.linearised import Linearised, Quadratic
from cahfp_cli.pruning.selection import Prediction, Selection, finished
from cahfp_cli.pruning.target import Target, Widths, target_of
from cahfp_cli.significance.divergence import divergence
from cahfp_cli.significance.gates import check_labels, classes_looked_at, gate_jacobian, predict
from cahfp_cli.significance.reach import find_reach
from cahfp_cli.significance.trust import effective_samples, is_saturated

Model = Literal["linear", "quadratic"]
"""How removal is predicted within a round: the softmax of linearised logits, or the quadratic form."""
Reference = Literal["network", "labels"]
"""What predictions are compared with: those of the full network, or the labels."""


@dataclass(frozen=True)
class SetOptions:
    """How to select.

    rounds: linearisations on the way. polish: rounds of compensation alone after them.
    compensate: whether the gates of survivors move. model, reference: see their types.
    at_once: calibration samples that a round looks at. damping: of compensation, see pruning/compensation.py.
    relevance: a class that both the reference and the network give less than this has no backward pass.
    batch_size: of the passes.
    """

    rounds: int = 15
    polish: int = 1
    compensate: bool = True
    model: Model = "linear"
    reference: Reference = "network"
    at_once: int = 256
    damping: float = DAMPING
    relevance: float = 4e-3
    batch_size: int = 64


FRONT_LOADING = 0.6
"""The share of the budget that is reached after a share `s` of the rounds is s to this power: the first groups to go
cost little, the last ones need the finer steps."""
LARGEST_GAP, LEAST_GAP = 3.0, 0.01
"""A divergence on samples held out that is so many times that on the samples fitted, and above it by so many nats, is
worth a warning."""
FORWARD_BATCHES = 4
"""Batches of forward passes alone are so many times larger: they keep no activations."""


def select_set(
    model: nn.Module,
    analysis: Analysis,
    cost: CostModel,
    budget: Budget,
    calibration: Dataset,
    options: SetOptions | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    held_out: Dataset | None = None,
) -> Selection:
    """Choose the groups to keep, and the gates that compensate for the others.

    Args:
        model: in evaluation mode on the device to compute on; left as it is.
        analysis: of it. cost: what candidate widths cost. budget: all its limits hold in the result.
        calibration: samples that are like those the network will see; labels count only for that reference.
        held_out: others like them, on which the result is judged and nothing is chosen.
    Returns: a selection with gates, 1 where nothing changed, and with what was predicted and measured.
    Raises:
        BudgetError: the narrowest network is already too much.
        InputError: gates cannot be measured, or outputs are not finite.
    """
    options = options or SetOptions()
    target = target_of(budget, cost, analysis.groups.narrowest)
    network = PrunedNetwork(model, analysis, calibration, options)
    rounds = options.rounds + (options.polish if options.compensate else 0)
    predicted = measured = 0.0
    warnings: list[str] = []
    for done in range(1, rounds + 1):
        linearised = network.linearised()
        if done == 1:
            warnings += saturation(linearised)
        if done <= options.rounds:
            share = (done / options.rounds) ** FRONT_LOADING
            predicted, measured = network.remove(linearised, cost, towards(target, cost, share))
        if options.compensate:
            network.compensate(linearised)
        on_progress(done, rounds)
    selection = finished(network.kept, cost, network.widths(), target)
    fitted = network.divergence()
    final = fitted if held_out is None else network.divergence_on(held_out)
    if final > fitted + LEAST_GAP and final > LARGEST_GAP * fitted:
        warnings.append(
            f"the submodel fits its {len(calibration)} calibration samples better than others (divergence "
            f"{fitted:.3f} and {final:.3f} nats): more --samples may help"
        )
    prediction = Prediction(predicted, measured, final, fitted, 0 if held_out is None else len(held_out))
    gates = network.gates if options.compensate else None
    return replace(selection, gates=gates, prediction=prediction, warnings=tuple(warnings))


def saturation(linearised: Linearised) -> list[str]:
    """A warning if the full network is so certain of its samples that few of them decide."""
    certainty = float(linearised.probabilities.amax(1).mean())
    contributions = linearised.contributions().cpu().double().clamp_min(0).numpy()
    effective = effective_samples(contributions)
    if not is_saturated(certainty, effective, len(contributions)):
        return []
    return [
        f"the network is certain of the calibration samples (mean probability {certainty:.1%}), so that few of them "
        f"decide (as much as {effective:.0f} alike of {len(contributions)}): calibrate on samples that it was not "
        "trained on"
    ]


def select_from_interactions(
    interactions: NDArray[np.float32], groups: ChannelGroups, cost: CostModel, budget: Budget
) -> Selection:
    """Choose the groups to keep by the quadratic form alone, in one go and without samples.

    Args: interactions: float32 (rows, groups), of a scores file.
    Raises: BudgetError: the narrowest network is already too much.
    """
    target = target_of(budget, cost, groups.narrowest)
    removal = Quadratic(torch.from_numpy(interactions), torch.zeros(groups.count))
    widths = remove_to_fit(removal, groups.family, cost, cost.full_widths, target)
    selection = finished(removal.alive.numpy(), cost, widths, target)
    return replace(selection, prediction=Prediction(removal.divergence()))


def towards(target: Target, cost: CostModel, share: float) -> Target:
    """A target on the way from the full network to `target`: limits by equal factors, widths by equal steps; share 1 is
    there."""

    def between(name: str, limit: float) -> float:
        whole = float(values_of(cost.full, name))
        return limit if share == 1.0 or limit >= whole else whole * (limit / whole) ** share

    limits = Limits({name: between(name, limit) for name, limit in target.limits.by_name.items()})
    most = cost.full_widths - np.floor((cost.full_widths - target.most) * share).astype(np.int64)
    return replace(target, limits=limits, most=most)


class PrunedNetwork:
    """The compact network on its way: which groups are left, their gates, and its logits on some calibration samples.

    Each round looks at samples of its own, as many as `options.at_once`, and its compensation is judged on the next
    round's: what fits only the samples that it was made from is not taken.

    kept: boolean (groups,). gates: float64 (groups,).
    """

    def __init__(self, model: nn.Module, analysis: Analysis, calibration: Dataset, options: SetOptions) -> None:
        """Nothing removed yet."""
        self._full, self._analysis, self._options = model.eval(), analysis, options
        self._samples, labels = self._on_device(calibration)
        logits = predict(model, self._samples, options.batch_size)
        check_finite(logits, calibration)  # no round may look at the sample that makes it so
        self._classes, self._reference = compared(logits, labels)
        with undisturbed(model):
            self._reach = find_reach(model, analysis.groups, self._samples, options.batch_size)
        self._movable = foldable(model, analysis)
        self._round = 0
        self._ahead: torch.Tensor | None = logits.gather(1, self._classes)[self._rows(1)]  # of the next round's samples
        self.kept = np.ones(analysis.groups.count, dtype=bool)
        self.gates = np.ones(analysis.groups.count)
        self._compact, self._groups = self._cut()
        self._weights = FoldedWeights(self._compact, self._groups)

    def widths(self) -> Widths:
        """Groups left of each family."""
        return self._analysis.groups.widths(self.kept)

    def divergence(self) -> float:
        """Measured divergence from the reference on all calibration samples, nats."""
        return divergence(self._reference, self._logits(torch.arange(len(self._samples))))

    def divergence_on(self, held_out: Dataset) -> float:
        """The same on samples that nothing was chosen on."""
        samples, labels = self._on_device(held_out)
        logits = predict(self._full, samples, self._options.batch_size)
        check_finite(logits, held_out)
        classes, reference = compared(logits, labels)
        found = predict(self._compact, samples, FORWARD_BATCHES * self._options.batch_size)
        return divergence(reference, found.gather(1, classes))

    def linearised(self) -> Linearised:
        """The network in its gates as it is now, on the next round's samples."""
        self._round += 1
        rows = self._rows(self._round)
        logits = self._logits(rows) if self._ahead is None else self._ahead
        found = gate_jacobian(
            self._compact,
            self._groups,
            self._samples[rows],
            self._classes[rows],
            logits,
            relevance=self._reference[rows],
            threshold=self._options.relevance,
            batch_size=self._options.batch_size,
            reach=self._reach,
        )
        return Linearised(found, self._reference[rows])

    def remove(self, linearised: Linearised, cost: CostModel, target: Target) -> tuple[float, float]:
        """Remove groups down to the target; returns the predicted divergence and the measured one, which then
        `linearised` has too."""
        removal = Quadratic.of(linearised) if self._options.model == "quadratic" else linearised
        remove_to_fit(removal, self._groups.family, cost, self.widths(), target)
        predicted = removal.divergence()
        linearised.alive = removal.alive
        self.kept[np.flatnonzero(self.kept)[~removal.alive.cpu().numpy()]] = False
        self._compact, self._groups = self._cut()
        self._weights = FoldedWeights(self._compact, self._groups)
        self._weights.set(self.gates[self.kept])
        self._ahead = None
        linearised.recentre(self._logits(self._rows(self._round)))
        return predicted, linearised.divergence()

    def compensate(self, linearised: Linearised) -> None:
        """Move the gates of the survivors where that brings the predictions closer to the reference."""
        alive = linearised.alive.cpu().numpy()
        numbers = np.flatnonzero(self.kept)
        movable = np.zeros(len(alive), dtype=bool)
        movable[alive] = self._movable[numbers]
        change = gauss_newton(linearised, movable, self._options.damping)[alive]
        rows = self._rows(self._round + 1)

        def logits_at(gates: Gates) -> torch.Tensor:
            self._weights.set(gates)
            return self._logits(rows)

        self.gates[numbers], self._ahead = compensated(self.gates[numbers], change, self._reference[rows], logits_at)
        self._weights.set(self.gates[numbers])

    def _on_device(self, data: Dataset) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Samples (n, ...), and their labels (n,) where those are the reference."""
        device = next(self._full.parameters()).device
        labels = torch.from_numpy(data.y).to(device) if self._options.reference == "labels" else None
        return torch.from_numpy(data.x).to(device), labels

    def _rows(self, number: int) -> torch.Tensor:
        """The samples of a round: one stretch after the other, around and around."""
        count = min(self._options.at_once, len(self._samples))
        return (torch.arange(count) + number * count) % len(self._samples)

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The compact network's logits of the classes looked at, (len(rows), m)."""
        logits = predict(self._compact, self._samples[rows], FORWARD_BATCHES * self._options.batch_size)
        return logits.gather(1, self._classes[rows])

    def _cut(self) -> tuple[nn.Module, ChannelGroups]:
        """The compact network of the groups that are left, with the groups as it has them."""
        groups = self._analysis.groups
        if self._analysis.rewritten:  # its code must be told the new widths, which takes a run on shapes
            compact, _ = cut(self._full, self._analysis, self.kept)
        else:
            compact = slice_module(self._full, groups.indices(self.kept)).eval()
        return compact, groups.restricted(self.kept)


def check_finite(logits: torch.Tensor, data: Dataset) -> None:
    """Raises: InputError: a logit on these samples is not a finite number."""
    if not torch.isfinite(logits).all():
        raise InputError(f"{data.name}: the network gives NaN or Inf on it: check the data and the weights")


def compared(logits: torch.Tensor, labels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The classes to look at, int64 (n, m), and the reference among them, (n, m), each row of which sums to 1.

    Args: logits: (n, classes), of the full network; labels: (n,), or None for its own predictions as reference.
    """
    classes = classes_looked_at(logits, None)
    if labels is None:
        return classes, logits.gather(1, classes).softmax(1)
    check_labels(labels, logits)
    missing = ~(classes == labels[:, None]).any(1)
    classes = classes.clone()
    classes[missing, -1] = labels[missing]  # in place of the least likely one
    return classes, (classes == labels[:, None]).to(logits.dtype)
