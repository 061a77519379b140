"""How far scores can be trusted: would other samples rank the same, and does the loss rise as it is predicted to?"""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.coupling.analysis import Analysis, cut
from cahfp_cli.coupling.groups import ChannelGroups
from cahfp_cli.significance.divergence import divergence
from cahfp_cli.significance.gates import predict
from cahfp_cli.significance.statistics import Floats, GateStatistics

SHARES = (0.05, 0.1, 0.2)
"""Of each family's groups, the least significant ones: the sets whose removal is predicted and measured."""
LEAST_RELIABILITY, LEAST_SAMPLES, LARGEST_RATIO = 0.9, 10.0, 3.0
"""Beyond these a warning is due."""
CERTAIN, LEAST_SHARE = 0.95, 0.25
"""A network that gives its likeliest classes more than this, on average, so that less than this share of the samples
carries the curvature, is saturated."""
ERRORS = 2.0
"""Standard errors by which an accuracy must be above chance."""


@dataclass(frozen=True)
class RemovedSet:
    """What removing `groups` groups, the `share` least significant of each family, does to the predictions on samples
    that the scores have not seen: divergence from the full network, nats, predicted by the scores and measured."""

    share: float
    groups: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class Trust:
    """reliability: rank correlation (Spearman) that scores of as many other samples are expected to have with these,
    from that of two halves by the Spearman-Brown formula. effective_samples: how many samples the curvature really
    rests on, (sum v)^2 / sum v^2 of the samples' contributions v. sets: empty where nothing was held out.
    samples, accuracy, chance, certainty: of the statistics, see there."""

    reliability: float
    effective_samples: float
    sets: tuple[RemovedSet, ...]
    samples: int = 0
    accuracy: float | None = None
    chance: float | None = None
    certainty: float | None = None

    @property
    def at_chance(self) -> bool:
        """Whether the network is no better than always naming the commonest label, as far as the samples tell."""
        if self.accuracy is None or self.chance is None:
            return False
        error = sqrt(self.chance * (1 - self.chance) / max(self.samples, 1))
        return self.accuracy <= self.chance + ERRORS * error

    def warnings(self) -> list[str]:
        """What is poor about the scores and what to do, in sentences for people."""
        if self.at_chance:  # then nothing else that is said of the scores means anything
            return [
                f"the network is at chance level on these samples (accuracy {self.accuracy:.1%}, always the same class "
                f"{self.chance:.1%}), and what has learnt nothing ranks nothing, however reliably: train it first, or "
                "check that --data and its labels are those that it was trained for"
            ]
        found = []
        saturated = is_saturated(self.certainty, self.effective_samples, self.samples)
        if saturated:
            found.append(
                f"the network is certain of these samples (mean probability {self.certainty:.1%}), so that few of them "
                f"carry all the curvature (as much as {self.effective_samples:.0f} alike of {self.samples}): score on "
                "samples that it was not trained on"
            )
        elif self.effective_samples < LEAST_SAMPLES:
            found.append(
                f"few samples carry all the curvature (as much as {self.effective_samples:.0f} alike); more --samples "
                "may help"
            )
        if self.reliability < LEAST_RELIABILITY:
            found.append(
                f"scores of other samples would rank groups differently (reliability {self.reliability:.2f})"
                + ("" if saturated else "; more --samples may help")
            )
        wrong = [s for s in self.sets if not 1 / LARGEST_RATIO < ratio(s) < LARGEST_RATIO]
        if self.sets and self.sets[0] in wrong:
            found.append(
                f"removing {self.sets[0].groups} groups changes predictions {ratio(self.sets[0]):.1f} times as much "
                "as the scores say: prune with --calibration, which measures what it removes"
            )
        return found


def is_saturated(certainty: float | None, effective: float, samples: int) -> bool:
    """Whether a network is so certain of its samples that few of them carry its curvature."""
    return certainty is not None and certainty > CERTAIN and effective < LEAST_SHARE * samples


def ratio(removed: RemovedSet) -> float:
    """Measured over predicted divergence; 1 where both vanish."""
    return (removed.measured + 1e-6) / (removed.predicted + 1e-6)


def trust(
    model: nn.Module,
    analysis: Analysis,
    significance: Floats,
    statistics: GateStatistics,
    held_out: NDArray[Any] | None,
    batch_size: int,
) -> Trust:
    """Judge scores and the gate statistics behind them.

    Args:
        model: in evaluation mode on the device to compute on. statistics: of it.
        significance: float64 (groups,), what decides on the sets that are removed for a test.
        held_out: samples like those of the statistics and not among them; None where there are none.
    """
    sets: tuple[RemovedSet, ...] = ()
    if held_out is not None and statistics.interactions is not None:
        sets = tuple(removed_sets(model, analysis, significance, statistics.interactions, held_out, batch_size))
    return Trust(
        reliability(statistics.halves),
        effective_samples(statistics.contributions),
        sets,
        statistics.samples,
        statistics.accuracy,
        statistics.chance,
        statistics.certainty,
    )


def effective_samples(contributions: Floats) -> float:
    """How many samples alike would do: (sum v)^2 / sum v^2 of the contributions v >= 0 to the curvature, float64
    (samples,)."""
    squares = float(np.square(contributions).sum())
    return float(contributions.sum()) ** 2 / squares if squares > 0 else 0.0


def reliability(halves: Floats) -> float:
    """Expected rank correlation of two whole samples from that of two halves, r -> 2 r / (1 + r) (Spearman 1910, Brown
    1910); 0 if the halves do not agree at all.

    Args: halves: float64 (2, groups).
    """
    from scipy.stats import spearmanr

    if halves.shape[1] < 2 or any(np.ptp(half) == 0 for half in halves):
        return 0.0
    correlation = max(float(spearmanr(halves[0], halves[1]).statistic), 0.0)
    return 2 * correlation / (1 + correlation)


def removed_sets(
    model: nn.Module,
    analysis: Analysis,
    significance: Floats,
    interactions: NDArray[np.float32],
    held_out: NDArray[Any],
    batch_size: int,
) -> list[RemovedSet]:
    """Predict and measure what some sets cost; sets that would be empty are left out."""
    samples = torch.from_numpy(held_out).to(next(model.parameters()).device)
    reference = predict(model, samples, batch_size).softmax(1)
    found = []
    for share in SHARES:
        kept = without_least(analysis.groups, significance, share)
        if kept.all():
            continue
        compact, _ = cut(model, analysis, kept)
        measured = divergence(reference, predict(compact, samples, batch_size))
        predicted = 0.5 * float(np.square(interactions[:, ~kept].sum(1, dtype=np.float64)).sum())
        found.append(RemovedSet(share, int((~kept).sum()), predicted, measured))
    return found


def without_least(groups: ChannelGroups, significance: Floats, share: float) -> NDArray[np.bool_]:
    """The mask without the `share` least significant groups of each family; families never get too narrow."""
    kept = np.ones(groups.count, dtype=bool)
    for family, narrowest in enumerate(groups.narrowest):
        members = np.flatnonzero(groups.family == family)
        count = min(int(share * len(members)), len(members) - int(narrowest))
        kept[members[np.argsort(significance[members], kind="stable")[: max(count, 0)]]] = False
    return kept
