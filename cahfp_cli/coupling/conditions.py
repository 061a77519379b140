"""The conditions under which networks are run to be traced, proved or compared: the same for all of these runs.

A trace that was made with torch's deterministic mode off cannot be compared with a slice that runs with it on: some
operators then run as others. The same holds for autocast, fused attention and whatever a network draws at random.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def random_streams(seed: int) -> Iterator[None]:
    """Every random stream that a network may use, from `seed` on, and afterwards as it was."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def conditions(dtype: torch.dtype, draws: int | None = None, seed: int = 0) -> Iterator[None]:
    """No gradients, no autocast, no deterministic mode, no fused attention, and the same random numbers every time.

    Args:
        dtype: what torch makes tensors in where code names none.
        draws: 0 or 1 makes every random number the least or the largest that it can be.
        seed: of the random numbers otherwise.
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
            stack.enter_context(extreme_draws(draws))
        torch.set_deterministic_debug_mode("default")
        torch.backends.mha.set_fastpath_enabled(False)  # it would hide the whole attention in one operator
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(default_dtype)
            torch.backends.mha.set_fastpath_enabled(fast_path)
            torch.set_deterministic_debug_mode(deterministic)


@contextmanager
def extreme_draws(which: int) -> Iterator[None]:
    """Random numbers are the least (0) or the largest (1) of their range; Python's and NumPy's in so far as code names
    them by their modules."""
    value = (0.0, 1.0 - 2.0**-24)[which]

    def unit(*shape: int, **_: Any) -> Any:
        return np.full(shape, value) if shape else value

    def between(low: float = 0.0, high: float = 1.0, size: Any = None) -> Any:
        found = low + (high - low) * value
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
        with ExtremeDraws(which, value):
            yield
    finally:
        for (module, name, _), function in zip(stand_ins, own, strict=True):
            setattr(module, name, function)


class ExtremeDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """As `extreme_draws`, of torch's uniform numbers, coins and integers."""

    def __init__(self, which: int, value: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.which, self.value = which, value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("rand", "rand_like"):
            return output.fill_(self.value)
        if name == "uniform" and len(args) > 2:
            return output.fill_(args[1] + (args[2] - args[1]) * self.value)
        if name == "uniform":
            return output.fill_(self.value)
        return output.fill_(self.which) if name == "bernoulli" else output
