"""Selection for a device that is at hand: measure what was selected, and aim anew until the measured latency fits.

The next aim is in proportion to the last measurement while that lies well between the largest aim that fitted and the
smallest that did not, and otherwise half way between the two: latency jumps with the widths, and a measurement may err.
Close to one of the two it would only come back to it, from the other side of a jump again and again.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from cahfp_cli.device.quantities import format_seconds
from cahfp_cli.errors import BudgetError
from cahfp_cli.pruning.budget import Budget, Limits
from cahfp_cli.pruning.selection import Selection

TRIES = 8
CLOSE = 0.92
"""A measured latency of so much of the limit is close enough to it."""
MARGIN = 0.98
"""Of what is left of the limit: the next measurement may come out a little higher."""
INSIDE = 0.25
"""Of what lies between two aims, the next one must be so far from both."""


@dataclass(frozen=True)
class Verified:
    """seconds: measured latency of the selection, within the budget. tries: selections that were measured."""

    selection: Selection
    seconds: float
    tries: int


def select_verified(
    budget: Budget, select: Callable[[Budget], Selection], measure: Callable[[Selection], float]
) -> Verified:
    """The largest network of a few tries whose measured latency is within the budget.

    Args:
        budget: with a latency. select: chooses for a budget. measure: seconds of one call of what was chosen.
    Raises: BudgetError: the narrowest network is too much, or no try was fast enough.
    """
    limit = budget.latency
    if limit is None:
        raise ValueError("there is no latency to verify")
    aim, best, fastest = limit, None, float("inf")
    fitted, missed = 0.0, float("inf")  # the largest aim that fitted, the smallest that did not
    for tries in range(1, TRIES + 1):
        try:
            selection = select(replace(budget, latency=aim))
        except BudgetError:
            if tries == 1:
                raise
            fitted, aim = aim, (aim + missed) / 2
            continue
        seconds = measure(selection)
        if seconds > limit:  # what else the machine does only ever makes a call slower
            seconds = min(seconds, measure(selection))
        fastest = min(fastest, seconds)
        if seconds <= limit:
            fitted = max(fitted, aim)
            if best is None or seconds > best.seconds:
                best = Verified(selection, seconds, tries)
            room = selection.binding == "latency" and not selection.kept.all()
            if seconds >= CLOSE * limit or not room:
                break
        else:
            missed = min(missed, aim)
        aim *= MARGIN * limit / seconds
        if fitted > 0 and missed < float("inf"):
            apart = INSIDE * (missed - fitted)
            aim = aim if fitted + apart < aim < missed - apart else (fitted + missed) / 2
    if best is None:
        raise BudgetError(
            f"no submodel was measured within {format_seconds(limit)}; the fastest took {format_seconds(fastest)}.\n"
            "Raise the budget, or measure the device's profile anew: cahfp profile measure."
        )
    limits = Limits({**best.selection.limits.by_name, "latency": limit})
    return replace(best, selection=replace(best.selection, limits=limits), tries=tries)
