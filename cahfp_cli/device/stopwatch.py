"""Seconds of one call of an ONNX file in ONNX Runtime on this machine's CPU.

With one thread the clock is that of the thread, which leaves out what other processes take; with several it is the wall
clock.
"""

import time
from pathlib import Path

import numpy as np

from cahfp_cli.training import onnx_session

SAMPLES, SECONDS = 9, 0.01
"""Stretches that are timed, and how long each lasts at least."""
QUANTILE = 1 / 3
"""Of the stretches: what disturbs a machine only makes it slower."""


def seconds_a_call(path: Path, threads: int = 1) -> float:
    """Seconds of one pass over one sample (or over the file's fixed batch).

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

    seconds(2)
    calls = max(1, int(SECONDS / max(seconds(2) / 2, 1e-7)))
    return float(np.quantile([seconds(calls) / calls for _ in range(SAMPLES)], QUANTILE))
