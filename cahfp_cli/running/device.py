"""Where to compute, and how to make it repeatable."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cahfp_cli.errors import UsageError
from cahfp_cli.models.random_streams import random_streams

NAMES = ("auto", "cpu", "cuda", "mps")


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is the first of cuda, mps, cpu that is there.

    Raises: UsageError: no such name, or the machine has none.
    """
    if name not in NAMES:
        raise UsageError(f"no device {name!r}: use one of {', '.join(NAMES)}.")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    if not present[name]:
        raise UsageError(f"--device {name}: PyTorch finds no {name} device here. Use --device auto or cpu.")
    return torch.device(name)


def use_threads(n: int | None) -> None:
    """Let PyTorch compute on `n` CPU threads from now on; None leaves its own choice."""
    if n is not None:
        torch.set_num_threads(n)


@contextmanager
def repeatable(seed: int, device: torch.device) -> Iterator[None]:
    """Run the block with all random streams from `seed` and deterministic algorithms, then put both back.

    An operator without a deterministic form warns and still runs.
    """
    mode = torch.get_deterministic_debug_mode()
    with random_streams(seed, () if device.type == "cpu" else (device,)):
        # Not use_deterministic_algorithms, which does the same but imports torch's compiler (1 s).
        torch.set_deterministic_debug_mode("warn")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
