"""Seconds of one call of an ONNX file in ONNX Runtime on this machine's CPU.

With one thread the clock is that of the thread, which leaves out what other processes take; with several it is the wall
clock. Neighbours still take cache and memory bandwidth, for a second or for minutes, and only ever make a call slower:
so a file is timed on several visits, apart from each other, of which the fastest counts.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cahfp_cli.running import onnx_session

SAMPLES, SECONDS = 5, 0.01
"""Stretches that are timed on a visit, and how long each lasts at least."""
QUANTILE = 1 / 3
"""Of a visit's stretches."""
VISITS, PAUSE = 4, 0.25
"""How often a single file is visited, and seconds in between."""


def seconds_a_call(path: Path, threads: int = 1) -> float:
    """Seconds of one pass over one sample (or over the file's fixed batch); takes two seconds.

    Raises: InputError: the file does not load or run.
    """
    visit = stopwatch(path, threads)
    found = [visit()]
    for _ in range(VISITS - 1):
        time.sleep(PAUSE)
        found.append(visit())
    return min(found)


def stopwatch(path: Path, threads: int) -> Callable[[], float]:
    """Opens a file to be timed: each call is a visit and returns seconds.

    Raises: InputError: the file does not load or run.
    """
    session = onnx_session.open_session(path, threads)
    batch = onnx_session.fixed_batch(session) or 1
    dtype = onnx_session.TYPES.get(session.get_inputs()[0].type, np.float32)
    sample = np.full((batch, *onnx_session.sample_shape(session, path)), 1, dtype=dtype)
    onnx_session.run(session, sample, path)
    inputs = {session.get_inputs()[0].name: sample}
    clock = time.thread_time if threads == 1 else time.perf_counter

    def seconds(calls: int) -> float:
        started = clock()
        for _ in range(calls):
            session.run(None, inputs)
        return clock() - started

    def visit() -> float:
        seconds(2)
        calls = max(1, int(SECONDS / max(seconds(2) / 2, 1e-7)))
        return float(np.quantile([seconds(calls) / calls for _ in range(SAMPLES)], QUANTILE))

    return visit
