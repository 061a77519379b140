"""What the server remembers of scores and masks from round to round, and how slowly masks may change.

Churn of masks costs more accuracy than a better mask gains, so scores are moving averages and a new mask exchanges only
a part of the old one.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.pruning.target import Widths

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
NEVER = -1
Kind = TypeVar("Kind", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Memory:
    """scores: float64 (clients, groups), moving averages, rows of zeros where `scored` is NEVER; scored: int64
    (clients,), the round of the last score; masks: boolean (clients, groups), what each client keeps."""

    scores: Floats
    scored: NDArray[np.int64]
    masks: Mask

    @staticmethod
    def new(masks: Mask) -> "Memory":
        """Nobody has scored, and clients keep these masks."""
        return Memory(np.zeros(masks.shape), np.full(len(masks), NEVER, np.int64), masks)

    def with_score(self, client: int, significance: Floats, number: int, decay: float) -> "Memory":
        """A client's new score of round `number`, scaled to a mean of 1 since losses of clients differ in size.

        decay: share of the old moving average that stays.
        """
        mean = float(significance.mean())
        new = significance / mean if mean > 0 else np.ones_like(significance)
        if self.scored[client] != NEVER:
            new = decay * self.scores[client] + (1 - decay) * new
        return replace(
            self,
            scores=_with_row(self.scores, client, new),
            scored=_with_row(self.scored, client, np.int64(number)),
        )

    def with_mask(self, client: int, mask: Mask) -> "Memory":
        """A client's new mask, (groups,)."""
        return replace(self, masks=_with_row(self.masks, client, mask))

    def significance(self, client: int, mix: float) -> Floats | None:
        """`mix` of the mean over all clients that have scored and the rest of the client's own (of the mean, where it
        has none); None before anybody has scored."""
        known = self.scored != NEVER
        if not known.any():
            return None
        shared = self.scores[known].mean(axis=0)
        own = self.scores[client] if known[client] else shared
        return np.asarray(mix * shared + (1 - mix) * own)


def _with_row(array: NDArray[Kind], row: int, value: NDArray[Kind] | Kind) -> NDArray[Kind]:
    changed = array.copy()
    changed[row] = value
    return changed


def limited(old: Mask, wanted: Mask, significance: Floats, family: Widths, churn: float) -> Mask:
    """The mask of `wanted`'s widths that exchanges at most the share `churn` of each family's kept groups for groups
    that `old` lacks, those of most significance; more only where the family grew.

    Args: all (groups,).
    """
    result = np.zeros_like(wanted)
    for number in np.unique(family):
        members = np.flatnonzero(family == number)
        width = int(wanted[members].sum())
        by_worth = members[np.argsort(-significance[members], kind="stable")]
        staying = by_worth[old[by_worth]]
        entering = by_worth[wanted[by_worth] & ~old[by_worth]]
        enter = min(len(entering), max(int(churn * width), width - len(staying)))
        result[entering[:enter]] = True
        result[staying[: width - enter]] = True
    return result
