"""The conditions under which networks are run to be traced, proved or compared: the same for all of these runs.

A trace that was made with torch's deterministic mode off cannot be compared with a slice that runs with it on: some
operators then run as others. The same holds for autocast, fused attention and whatever a network draws at random.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cahfp_cli.models.random_streams import random_streams


@contextmanager
def conditions(dtype: torch.dtype, draws: "Draws | None" = None, seed: int = 0) -> Iterator[None]:
    """No gradients, no autocast, no deterministic mode, no fused attention, and the same random numbers every time.

    Args:
        dtype: what torch makes tensors in where code names none.
        draws: what random numbers come out as.
        seed: of the random numbers without it.
    """
    deterministic = torch.get_deterministic_debug_mode()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    default_dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(random_streams(seed))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if draws is not None:
            stack.enter_context(extreme(draws))
        torch.set_deterministic_debug_mode("default")
        torch.backends.mha.set_fastpath_enabled(False)  # it would hide the whole attention in one operator
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(default_dtype)
            torch.backends.mha.set_fastpath_enabled(fast_path)
            torch.set_deterministic_debug_mode(deterministic)


class Draws:
    """Random numbers in turn the least (0) and the largest (1) of their range, by a pattern that is repeated; `made`
    and `as_numbers` are whether code asked for one, as a tensor or as a number of Python."""

    def __init__(self, pattern: tuple[int, ...]) -> None:
        self.made = self.as_numbers = False
        self._turns = cycle(pattern)

    def coin(self) -> int:
        self.made = True
        return next(self._turns)

    def unit(self) -> float:
        return (0.0, 1.0 - 2.0**-24)[self.coin()]

    def number(self) -> float:
        self.as_numbers = True
        return self.unit()


@contextmanager
def extreme(draws: Draws) -> Iterator[None]:
    """Random numbers come out as `draws` says; Python's and NumPy's in so far as code names them by their modules."""

    def unit(*shape: int, **_: Any) -> Any:
        return np.full(shape, draws.number()) if shape else draws.number()

    def between(low: float = 0.0, high: float = 1.0, size: Any = None) -> Any:
        found = low + (high - low) * draws.number()
        return found if size is None else np.full(size, found)

    def sized(size: Any = None) -> Any:
        return between(size=size)

    stand_ins: list[tuple[Any, str, Callable[..., Any]]] = [
        (random, "random", unit),
        (random, "uniform", between),
        (np.random, "rand", unit),
        (np.random, "random", sized),
        (np.random, "uniform", between),
    ]
    own = [getattr(module, name) for module, name, _ in stand_ins]
    try:
        for module, name, function in stand_ins:
            setattr(module, name, function)
        with ExtremeDraws(draws):
            yield
    finally:
        for (module, name, _), function in zip(stand_ins, own, strict=True):
            setattr(module, name, function)


class ExtremeDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """As `extreme`, of torch's uniform numbers and coins."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws = draws

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or it imports the compiler, seconds of work, to keep it out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        match func.overloadpacket.__name__.rstrip("_"):
            case "rand" | "rand_like":
                output.fill_(self.draws.unit())
            case "uniform":
                low, high = args[1:3] if len(args) > 2 else (0.0, 1.0)
                output.fill_(low + (high - low) * self.draws.unit())
            case "bernoulli":
                output.fill_(self.draws.coin())
        return output
