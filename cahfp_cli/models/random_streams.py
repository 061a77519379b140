"""The random streams that a network's code may draw from, all of them from one seed."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_streams(seed: int, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Start torch's, NumPy's and Python's random numbers from `seed`, and put all of them back afterwards.

    Args: devices: other than the CPU, of one type, whose generators are to follow too.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    kind = devices[0].type if devices else "cuda"
    try:
        with torch.random.fork_rng(devices=list(devices), device_type=kind):
            if devices:
                torch.manual_seed(seed)
            else:
                torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def positions() -> tuple[bytes, ...]:
    """Where the three streams stand: equal before and after what drew nothing."""
    _, keys, *rest = np.random.get_state()
    others = (random.getstate(), rest)
    return (torch.default_generator.get_state().numpy().tobytes(), np.asarray(keys).tobytes(), repr(others).encode())
