"""Numbers of the user's code that a slice must change, found by running the sliced model and put in place by hooks.

The repair for code that fixes widths: the model stays one of the user's own class and its forward runs as written, but
in the calls that `Rewrite` names one number is another. In comparison with rewriting an exported graph both modes of
the model go on working, nothing is exported, and every head or channel can still be pruned on its own.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cahfp_cli.coupling.calls import (
    CONTRACTING,
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
from cahfp_cli.coupling.rewrites import Number, Rewrite

M = TypeVar("M", bound=nn.Module)


class CallRecorder(TorchFunctionMode):
    """Records the calls of a trace, and says which contracting call runs.

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
    """Runs a sliced model beside the records of the full one and gives each call the numbers that it needs; what was
    changed is in `rewrites`. Calls that the model's code makes in another order are left alone."""

    def __init__(self, stack: ModuleStack, records: Sequence[CallRecord], widths: Widths, training: bool) -> None:
        super().__init__()
        self.rewrites: list[Rewrite] = []
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
                changed = {
                    i: (old, new) for i, (old, new) in enumerate(zip(numbers, wanted, strict=True)) if old != new
                }
                self.rewrites += [
                    Rewrite(module, self._training, *call, i, old, new) for i, (old, new) in changed.items()
                ]
                args, kwargs = substitute(args, kwargs, changed)
        return func(*args, **kwargs)


class Rewriter(TorchFunctionMode):
    """Changes numbers in the calls of one activation of a module; entered and left by its hooks."""

    def __init__(self, rewrites: Sequence[Rewrite]) -> None:
        super().__init__()
        self._wanted: dict[tuple[bool, CallKey], dict[int, tuple[Number, Number]]] = {}
        for rewrite in rewrites:
            key = rewrite.training, CallKey(rewrite.function, rewrite.place, rewrite.time)
            self._wanted.setdefault(key, {})[rewrite.argument] = (rewrite.old, rewrite.new)
        self._functions = {rewrite.function for rewrite in rewrites}
        self._training = False
        self._calls: Counter[tuple[str, str]] = Counter()

    def start(self, module: nn.Module, inputs: Any) -> None:
        self._training = module.training
        self._calls.clear()
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self._functions:
            where = place()
            self._calls[name, where] += 1
            changed = self._wanted.get((self._training, CallKey(name, where, self._calls[name, where])), {})
            args, kwargs = substitute(args, kwargs, changed)
        return func(*args, **kwargs)


def place() -> str:
    """Where the user's code calls a function: the innermost Python function that is not ours, and the line in it."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(__package__):
        frame = frame.f_back
    return f"{frame.f_code.co_qualname}:{frame.f_lineno - frame.f_code.co_firstlineno}"


def count_call(stack: ModuleStack, function: str) -> tuple[str | None, CallKey]:
    """Count one call in every activation under way; the innermost module, and which of its calls this is."""
    where = place()
    for frame in stack.frames:
        frame.calls[function, where] += 1
    if not stack.frames:
        return None, CallKey(function, where, 0)
    return stack.frames[-1].path, CallKey(function, where, stack.frames[-1].calls[function, where])


def substitute(args: Any, kwargs: Any, changed: dict[int, tuple[Number, Number]]) -> tuple[Any, Any]:
    """The arguments with the numbers at some positions exchanged."""
    if not changed:
        return args, kwargs
    position = -1

    def change(number: Any) -> Any:
        nonlocal position
        position += 1
        if position not in changed:
            return number
        old, new = changed[position]
        return scaled(number, old, new)

    new_args, new_kwargs = map_numbers((tuple(args), dict(kwargs)), change)
    return new_args, new_kwargs


def scaled(number: Any, old: Number, new: Number) -> Any:
    """`new` for `old`; for another number, such as that of a larger batch, what is in the same proportion to it.

    Raises: RuntimeError: any other number, for which the slice has no answer.
    """
    if number == old:
        return new
    if isinstance(old, int) and old > 0 and isinstance(number, int | torch.SymInt) and number * new % old == 0:
        return number * new // old
    raise RuntimeError(f"the model's code uses the number {number} where it used {old} when the submodel was cut")


def install(model: M, rewrites: Sequence[Rewrite]) -> M:
    """Put rewrites in place, by hooks on the modules that they name.

    Raises: ValueError: a module that the model does not have.
    """
    modules = dict(model.named_modules())
    by_module: dict[str, list[Rewrite]] = {}
    for rewrite in rewrites:
        by_module.setdefault(rewrite.module, []).append(rewrite)
    unknown = sorted(by_module.keys() - modules.keys())
    if unknown:
        raise ValueError(f"the model has no module {unknown[0]!r}")
    for path, own in by_module.items():
        rewriter = Rewriter(own)
        modules[path].register_forward_pre_hook(rewriter.start)
        modules[path].register_forward_hook(rewriter.stop, always_call=True)
    return model
