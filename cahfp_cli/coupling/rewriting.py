"""Numbers of the user's code that a slice must change, found by running the sliced model and put in place by hooks.

The repair for code that fixes widths: the model stays one of the user's own class and its forward runs as written, but
in the calls that `Rewrite` names one number is another. In comparison with rewriting an exported graph both modes of
the model go on working, nothing is exported, and every head or channel can still be pruned on its own.

What a call's number becomes depends on the place in the code and on the number alone, so that loops may turn as often
as they like and threads may share a model; code that needs two answers at one place cannot be rewritten.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from cahfp_cli.coupling.calls import (
    CONTRACTING,
    VALUE_READERS,
    WANTED,
    CallKey,
    CallRecord,
    Widths,
    channels_read,
    map_numbers,
    numbers_in,
)
from cahfp_cli.coupling.module_stack import ModuleStack
from cahfp_cli.coupling.registry import Axes, Couplings
from cahfp_cli.formats.rewrites import Number, Rewrite

M = TypeVar("M", bound=nn.Module)
Numbers = Mapping[Number, Number]
"""What each number at one place becomes."""


class CallRecorder(TorchFunctionMode):
    """Records the calls of a trace, and says which contracting call runs; `reads_values` if the code looked at what a
    tensor holds.

    Args:
        number: gives the trace's value of a tensor; axes: of a value.
    """

    def __init__(
        self,
        stack: ModuleStack,
        couplings: Couplings,
        number: Callable[[torch.Tensor], int],
        axes: Callable[[torch.Tensor], Axes],
    ) -> None:
        super().__init__()
        self.records: list[CallRecord] = []
        self.reads_values = False
        self._stack = stack
        self._couplings = couplings
        self._number = number
        self._axes = axes
        self._contractions = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CONTRACTING:
            read = self._axes(channels_read(func, args, kwargs))
            self._couplings.reading = (self._contractions, read[CONTRACTING[func][1]])
            self._contractions += 1
            try:
                return func(*args, **kwargs)
            finally:
                self._couplings.reading = None
        name = getattr(func, "__name__", "")
        self.reads_values |= name in VALUE_READERS
        if name not in WANTED:
            return func(*args, **kwargs)
        module, call = count_call(self._stack, name)
        numbers = tuple(numbers_in(args, kwargs))
        result = func(*args, **kwargs)
        tensors = result if isinstance(result, tuple | list) else (result,)
        if numbers:
            source = self._number(args[0]) if args and isinstance(args[0], torch.Tensor) else None
            values = tuple(self._number(t) for t in tensors)
            self.records.append(CallRecord(module, call, numbers, source, values))
        return result


class CallFollower(TorchFunctionMode):
    """Runs a sliced model beside the records of the full one and gives each call the numbers that it needs; `said` has
    for every argument of a call at its place what it said and what it must say, and the record that shows it. Calls
    that the model's code makes in another order are left alone."""

    def __init__(self, stack: ModuleStack, records: Sequence[CallRecord], widths: Widths, training: bool) -> None:
        super().__init__()
        self.said: list[tuple[Rewrite, CallRecord]] = []
        self._stack = stack
        self._records = iter(records)
        self._widths = widths
        self._training = training

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in WANTED:
            return func(*args, **kwargs)
        module, call = count_call(self._stack, name)
        numbers = numbers_in(args, kwargs)
        if numbers:
            record = next(self._records, None)
            if record is None or (record.module, record.call) != (module, call):
                self._records = iter(())
            elif module is not None and len(numbers) == len(record.numbers):
                wanted = WANTED[name](self._widths, record, args, kwargs)
                self.said += [
                    (Rewrite(module, self._training, name, call.place, i, old, new), record)
                    for i, (old, new) in enumerate(zip(numbers, wanted, strict=True))
                ]
                args, kwargs = substitute(args, kwargs, wanted.__getitem__)
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Contradiction:
    """A call that needs another number than an earlier one at the same place with the same number."""

    record: CallRecord
    problem: str


def rewrites_of(said: Sequence[tuple[Rewrite, CallRecord]]) -> tuple[Rewrite, ...] | Contradiction:
    """What must be rewritten, of everything that calls said: the arguments that change at least once, each number once.

    Numbers that stay are kept beside those that change at one place, since others are scaled.
    """
    by_argument: dict[tuple[Any, ...], dict[Number, Rewrite]] = {}
    for one, record in said:
        known = by_argument.setdefault((one.module, one.training, one.function, one.place, one.argument), {})
        if known.setdefault(one.old, one).new != one.new:
            return Contradiction(record, f"{one.function} in {one.module or 'the model'} needs two widths at one place")
    changed = [known for known in by_argument.values() if any(one.old != one.new for one in known.values())]
    return tuple(one for known in changed for one in known.values())


@dataclass(frozen=True)
class Table:
    """Rewrites as they are looked up: by module, mode, function and place the numbers of each argument."""

    numbers: Mapping[tuple[str, bool, str, str], Mapping[int, Numbers]]
    functions: frozenset[str]


def table_of(rewrites: Sequence[Rewrite]) -> Table:
    numbers: dict[tuple[str, bool, str, str], dict[int, dict[Number, Number]]] = {}
    for one in rewrites:
        at = numbers.setdefault((one.module, one.training, one.function, one.place), {})
        at.setdefault(one.argument, {})[one.old] = one.new
    return Table(numbers, frozenset(one.function for one in rewrites))


class Rewriting(TorchFunctionMode):
    """Changes numbers in the calls of one run of a model. It belongs to that run, and so to one thread: `running` are
    the modules under way with their modes, the innermost last."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table
        self.running: list[tuple[str, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self.table.functions:
            where = place()
            at = self.table.numbers.get((*self.running[-1], name, where))
            if at is not None:
                given = numbers_in(args, kwargs)
                wanted = [answer(number, at.get(i), where) for i, number in enumerate(given)]
                args, kwargs = substitute(args, kwargs, wanted.__getitem__)
        return func(*args, **kwargs)


def enter(table: Table, path: str, module: nn.Module, inputs: Any) -> None:
    """Before a module runs: note it in the run under way in this thread, or begin one."""
    run = run_under_way(table)
    if run is None:
        run = Rewriting(table)
        run.__enter__()  # type: ignore[no-untyped-call]
    run.running.append((path, module.training))


def leave(table: Table, module: nn.Module, inputs: Any, output: Any) -> None:
    """After a module ran or failed; the outermost ends the run."""
    run = run_under_way(table)
    if run is not None and run.running:
        run.running.pop()
        if not run.running:
            run.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def run_under_way(table: Table) -> Rewriting | None:
    """This thread's run of the model whose rewrites these are."""
    modes = reversed(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]
    return next((mode for mode in modes if isinstance(mode, Rewriting) and mode.table is table), None)


def place() -> str:
    """Where the user's code calls a function: the innermost Python function that is not ours, the line in it and the
    column where the call ends, since a line may hold several."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(__package__):
        frame = frame.f_back
    return place_in(frame.f_code, frame.f_lasti)


@lru_cache(maxsize=4096)
def place_in(code: CodeType, instruction: int) -> str:
    """As `place`, of an instruction of a function."""
    _, line, _, column = list(code.co_positions())[instruction // 2]
    return f"{code.co_qualname}:{(line or 0) - code.co_firstlineno}:{column}"


def count_call(stack: ModuleStack, function: str) -> tuple[str | None, CallKey]:
    """Count one call in every activation under way; the innermost module, and which of its calls this is."""
    where = place()
    for frame in stack.frames:
        frame.calls[function, where] += 1
    if not stack.frames:
        return None, CallKey(function, where, 0)
    return stack.frames[-1].path, CallKey(function, where, stack.frames[-1].calls[function, where])


def substitute(args: Any, kwargs: Any, wanted: Callable[[int], Any]) -> tuple[Any, Any]:
    """The arguments with number i among them exchanged for `wanted(i)`."""
    position = -1

    def change(number: Any) -> Any:
        nonlocal position
        position += 1
        return wanted(position)

    new_args, new_kwargs = map_numbers((tuple(args), dict(kwargs)), change)
    return new_args, new_kwargs


class UnforeseenNumberError(RuntimeError):
    """The model's code says a number for which the rewrites at `place` have no answer."""

    def __init__(self, number: Any, place: str) -> None:
        super().__init__(f"the model's code says {number} at {place}, which no width of the submodel answers to")
        self.place = place


def answer(number: Any, numbers: Numbers | None, place: str) -> Any:
    """What a number becomes: what the rewrites say, or, for one that they do not name such as that of a larger batch,
    what is in the same proportion to it.

    Raises: UnforeseenNumberError: there is no proportion, or it gives no whole number.
    """
    if numbers is None or (isinstance(number, int) and number == -1):
        return number
    for old, new in numbers.items():  # no look-up: the exporter's symbols have no hash
        if number == old:
            return new
    old, new = next(iter(numbers.items()))
    alike = all(isinstance(a, int) and a > 0 and a * new == b * old for a, b in numbers.items())
    if alike and isinstance(number, int | torch.SymInt) and number * int(new) % int(old) == 0:
        return number * int(new) // int(old)
    raise UnforeseenNumberError(number, place)


def install(model: M, rewrites: Sequence[Rewrite]) -> M:
    """Put rewrites in place, by hooks on every module: which of them runs decides whose rewrites hold.

    Raises: ValueError: a module that the model does not have.
    """
    if not rewrites:
        return model
    modules = dict(model.named_modules())
    unknown = sorted({one.module for one in rewrites} - modules.keys())
    if unknown:
        raise ValueError(f"the model has no module {unknown[0]!r}")
    table = table_of(rewrites)
    for path, module in modules.items():
        module.register_forward_pre_hook(partial(enter, table, path))
        module.register_forward_hook(partial(leave, table), always_call=True)
    return model
