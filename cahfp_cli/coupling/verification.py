"""The op-log check: a sliced copy runs on meta tensors, and operator k must do what the atoms predict.

It must give exactly the predicted shapes, cut where predicted, and compute with the same numbers (a scale that followed
a width would change what is kept). Calls in which the code gives other numbers are rewritten on the way.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.coupling.atoms import Labels, varies
from cahfp_cli.coupling.calls import CallRecord
from cahfp_cli.coupling.groups import ChannelGroups
from cahfp_cli.coupling.meta_run import Mode, Subject, forward
from cahfp_cli.coupling.module_stack import ModuleStack
from cahfp_cli.coupling.operator_log import Logged, OperatorLog
from cahfp_cli.coupling.rewriting import CallFollower, Contradiction, UnforeseenNumberError, install, rewrites_of
from cahfp_cli.coupling.slicing import clone, slice_module
from cahfp_cli.coupling.trace import Operation, Trace
from cahfp_cli.errors import first_line
from cahfp_cli.formats.rewrites import Rewrite

Mask = NDArray[np.bool_]

LAYOUT: dict[str, str | None] = {
    "clone": None,
    "contiguous": None,
    "detach": None,
    "alias": None,
    "as_strided_": None,  # where it is more than layout, its rule pins all that it reads
    "_unsafe_view": "view",
    "_reshape_alias": "view",
    "_reshape_copy": "view",
    "view_copy": "view",
}
"""Operators that come and go with the memory layout of a width and mean the same: left out (None) or renamed."""

LARGER_BATCH = 3
"""One that no trace was made with: code that runs once for each sample, or says the batch, shows itself."""


@dataclass(frozen=True)
class Mismatch:
    """Where a sliced model departed from the prediction: operator number `position` of trace number `trace`; `raised`
    if the model's code stopped before it or in it. `alike`: a call that needs another width than an earlier one at its
    place, as in a loop over heads, if that is all."""

    trace: int
    position: int
    problem: str
    raised: bool = False
    alike: CallRecord | None = None


class Plan:
    """The groups behind every axis of a trace's values, laid out so that a mask's widths are one sum.

    Args:
        group_of_atom: int64 (atoms,), the group of each atom or -1.
    """

    def __init__(self, trace: Trace, group_of_atom: Labels) -> None:
        self.trace = trace
        self.operations = [
            (position, operation, LAYOUT.get(operation.name, operation.name))
            for position, operation in enumerate(trace.operations)
            if LAYOUT.get(operation.name, operation.name)
        ]
        self._numbers: dict[int, int] = {}
        pieces: list[Labels] = []
        for value in trace.values:
            for labels in value.axes:
                if id(labels) not in self._numbers and varies(labels):
                    self._numbers[id(labels)] = len(pieces)
                    pieces.append(group_of_atom[labels])
        self.pieces = pieces
        self._groups = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
        self._starts = np.cumsum([0, *(len(piece) for piece in pieces)])[:-1]

    def number(self, labels: Labels) -> int | None:
        """Which piece an axis is; None if all of it survives every mask."""
        return self._numbers.get(id(labels))

    def widths(self, kept: Mask) -> "MaskedWidths":
        """What a mask (groups,) leaves of each axis."""
        alive = np.append(kept, True)  # label -1 picks the last entry: what belongs to no group survives
        counts = np.add.reduceat(alive[self._groups], self._starts, dtype=np.int64) if self.pieces else self._starts
        return MaskedWidths(self, alive, counts.tolist())


@dataclass(frozen=True)
class MaskedWidths:
    """The `Widths` of one mask."""

    plan: Plan
    alive: Mask
    counts: list[int]

    def shape(self, value: int) -> tuple[int, ...]:
        numbers = ((self.plan.number(labels), labels) for labels in self.plan.trace.values[value].axes)
        return tuple(len(labels) if number is None else self.counts[number] for number, labels in numbers)

    def before(self, value: int, axis: int, index: int) -> int:
        number = self.plan.number(self.plan.trace.values[value].axes[axis])
        return index if number is None else int(self.alive[self.plan.pieces[number][:index]].sum())

    def length(self, value: int, axis: int) -> int:
        return len(self.plan.trace.values[value].axes[axis])


@dataclass(frozen=True)
class Verified:
    """What a sliced copy showed: the first mismatch, None if there is none, and the rewrites that it needs."""

    mismatch: Mismatch | None
    rewrites: tuple[Rewrite, ...]


def verify(subject: Subject, plans: Sequence[Plan], groups: ChannelGroups, kept: Mask) -> Verified:
    """Slice, run in every mode, compare operator by operator; then, where rewrites were needed, once more with these
    in place as they will be, and with a larger batch.

    Args: plans: of the subject's traces in its `modes`.
    """
    sliced = slice_module(subject.model, groups.indices(kept))
    said: list[tuple[Rewrite, CallRecord]] = []
    for number, (plan, mode) in enumerate(zip(plans, subject.modes, strict=True)):
        widths = plan.widths(kept)
        compact = clone(sliced)  # a run may change the model's state
        stack = ModuleStack(compact)
        follower = CallFollower(stack, plan.trace.calls, widths, mode.training)
        mismatch = run_beside(compact, subject, number, plan, widths, mode, stack, follower)
        if mismatch is not None:
            return Verified(mismatch, ())
        found = rewrites_of([*said, *follower.said])
        if isinstance(found, Contradiction):
            position = position_of(plan.trace, found.record)
            return Verified(Mismatch(number, position, found.problem, alike=found.record), ())
        said += follower.said
    rewrites = rewrites_of(said)
    assert not isinstance(rewrites, Contradiction)
    mismatch = prove_rewrites(sliced, subject, plans, kept, rewrites) if rewrites else None
    return Verified(mismatch, rewrites if mismatch is None else ())


def run_beside(
    compact: nn.Module,
    subject: Subject,
    number: int,
    plan: Plan,
    widths: "MaskedWidths",
    mode: Mode,
    *watchers: AbstractContextManager[Any],
) -> Mismatch | None:
    """Run a sliced model in one mode; where it departs from trace `number`."""
    log = OperatorLog()
    problem = None
    try:
        forward(subject, compact, mode, subject.sample(mode.batch), *watchers, log)
    except Exception as error:  # whatever the user's own forward raises on a width it does not expect
        problem = first_line(error)
    return compare(number, plan, widths, log.entries, problem)


def prove_rewrites(
    sliced: nn.Module, subject: Subject, plans: Sequence[Plan], kept: Mask, rewrites: tuple[Rewrite, ...]
) -> Mismatch | None:
    """Where a sliced model with its rewrites in place does not do as planned, or not run on a batch of another size."""
    for number, (plan, mode) in enumerate(zip(plans, subject.modes, strict=True)):
        compact = install(clone(sliced), rewrites)
        mismatch = run_beside(compact, subject, number, plan, plan.widths(kept), mode)
        if mismatch is not None:
            return mismatch
        log = OperatorLog()
        try:
            forward(subject, install(clone(sliced), rewrites), mode, subject.sample(LARGER_BATCH), log)
        except UnforeseenNumberError as error:
            at = next(record for record in plan.trace.calls if record.call.place == error.place)
            return Mismatch(number, position_of(plan.trace, at), str(error))
        except Exception as error:  # as above
            stopped = min(len(log.entries), len(plan.trace.operations) - 1)
            return Mismatch(number, stopped, f"with {LARGER_BATCH} samples: {first_line(error)}", raised=True)
    return None


def position_of(trace: Trace, record: CallRecord) -> int:
    """The operator that made what a call returned; the first that read it where the call ran none."""
    results = set(record.results)
    made = (i for i, operation in enumerate(trace.operations) if results & {*operation.outputs})
    read = (i for i, operation in enumerate(trace.operations) if results & {*operation.inputs})
    return next(made, next(read, len(trace.operations) - 1))


def compare(
    number: int, plan: Plan, widths: MaskedWidths, entries: Sequence[Logged], problem: str | None
) -> Mismatch | None:
    """The first operator of a run that did not do as predicted."""
    ran = [(LAYOUT.get(entry.name, entry.name), entry) for entry in entries]
    ran = [(name, entry) for name, entry in ran if name]
    planned_operations = [found for found in plan.operations if not is_whole(found[1], widths)]
    ran = [(name, entry) for name, entry in ran if not entry.whole]
    position = 0
    for (position, operation, planned), (name, entry) in zip(planned_operations, ran, strict=False):
        if name != planned:
            return Mismatch(number, position, f"the sliced model ran {entry.name} instead of {operation.name}")
        predicted = tuple(widths.shape(value) for value in operation.outputs)
        if entry.shapes != predicted:
            return Mismatch(number, position, f"shape {entry.shapes} instead of {predicted}")
        if entry.numbers != operation.numbers:
            return Mismatch(number, position, f"numbers {entry.numbers} instead of {operation.numbers}")
        if entry.offset != predicted_offset(operation, widths):
            return Mismatch(number, position, "the bounds of a cut do not follow the widths")
    if len(ran) < len(planned_operations):
        stopped = planned_operations[len(ran)][0]
        return Mismatch(number, stopped, problem or "the sliced model ran fewer operators", problem is not None)
    if problem is not None or len(ran) > len(planned_operations):
        return Mismatch(number, position, problem or "the sliced model ran more operators")
    return None


def is_whole(operation: Operation, widths: MaskedWidths) -> bool:
    """Whether a cut takes all of its axis in the sliced model: Python's indexing then skips the operator."""
    if operation.offset is None:
        return False
    return widths.shape(operation.inputs[0]) == widths.shape(operation.outputs[0])


def predicted_offset(operation: Operation, widths: MaskedWidths) -> tuple[int, int] | None:
    """Where a cut must start in the sliced model."""
    if operation.offset is None:
        return None
    axis, start = operation.offset
    return axis, widths.before(operation.inputs[0], axis, start)
