"""Wall time of one forward pass at batch 1 on this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cahfp_cli.errors import InputError, first_line
from cahfp_cli.models.undisturbed import undisturbed
from cahfp_cli.running import onnx_session

WARM_UP = 5
RUNS = 30


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one pass: the median and the 90th percentile of `runs` passes."""

    median_ms: float
    p90_ms: float
    runs: int


def time_calls(call: Callable[[], object], runs: int = RUNS, warm_up: int = WARM_UP) -> Latency:
    """Time `call`, which must return only when its work is done, after `warm_up` calls that do not count."""
    for _ in range(warm_up):
        call()
    milliseconds = []
    for _ in range(runs):
        started = time.perf_counter_ns()
        call()
        milliseconds.append((time.perf_counter_ns() - started) / 1e6)
    median, p90 = np.percentile(milliseconds, [50, 90])
    return Latency(median_ms=float(median), p90_ms=float(p90), runs=runs)


def latency(
    model: nn.Module,
    input_shape: tuple[int, ...],
    device: torch.device,
    runs: int = RUNS,
    dtype: torch.dtype = torch.float32,
) -> Latency:
    """Latency of a module, moved to `device` and else left as it was, on one sample of zeros.

    Raises: InputError: the model does not run on that shape.
    """
    model.to(device)
    sample = torch.zeros(1, *input_shape, dtype=dtype, device=device)

    def forward() -> None:
        model(sample)
        synchronise(device)

    try:
        with undisturbed(model), torch.inference_mode():
            model.eval()
            return time_calls(forward, runs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shape = "x".join(map(str, input_shape))
        raise InputError(f"the model fails on one sample of {shape}: {first_line(error)}") from error


def latency_onnx(path: Path, threads: int | None = None, runs: int = RUNS) -> Latency:
    """Latency of an ONNX file in ONNX Runtime on the CPU, on one sample of zeros (or the file's fixed batch size).

    Raises: InputError: the file does not load or run.
    """
    session = onnx_session.open_session(path, threads)
    dtype = onnx_session.TYPES.get(session.get_inputs()[0].type, np.float32)
    batch = onnx_session.fixed_batch(session) or 1
    sample = np.zeros((batch, *onnx_session.sample_shape(session, path)), dtype=dtype)
    onnx_session.run(session, sample, path)
    return time_calls(lambda: session.run(None, {session.get_inputs()[0].name: sample}), runs)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done its work; the CPU already has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
