"""A profile of the machine that this runs on, from microbenchmarks."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from cahfp_cli.device.calibration import Fit, fit
from cahfp_cli.device.latency import CLASSES
from cahfp_cli.device.microbenchmarks import Microbenchmark, microbenchmarks
from cahfp_cli.device.profile import DeviceProfile
from cahfp_cli.device.sizes import Array
from cahfp_cli.running.processor import processor
from cahfp_cli.running.stopwatch import stopwatch

COPIED = 256 * 2**20
"""Bytes of an array that no cache holds."""
ROUNDS = 3
"""Visits to each microbenchmark, one round through all after the other; the fastest counts."""
FALLBACK_RATE = 1e15
"""Operations or bytes a second of a term that takes no time."""
TO_DEVIATION = 1.4826
"""From the median size of normal errors to their standard deviation. A network is a sum of many kernels: the few odd
ones, which would rule a root mean square, say little of it."""


@dataclass(frozen=True)
class Measured:
    """profile: complete. fit: what its calibration says, with residuals. names, seconds: the microbenchmarks."""

    profile: DeviceProfile
    fit: Fit
    names: tuple[str, ...]
    seconds: Array


def measure_device(
    name: str,
    threads: int,
    links: dict[str, Any],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Measure this machine's CPU with ONNX Runtime; takes well under a minute.

    Args: name: of the profile. threads: that ONNX Runtime computes with. links: `uplink` and `downlink` as a profile
        holds them.
    """
    benchmarks = tuple(microbenchmarks())
    with TemporaryDirectory() as folder:
        paths = written(benchmarks, Path(folder))
        seconds = np.full(len(paths), np.inf)
        for done in range(ROUNDS * len(paths)):
            number = done % len(paths)
            seconds[number] = min(seconds[number], stopwatch(paths[number], threads)())
            on_progress(done + 1, ROUNDS * len(paths))
    return measured_by(benchmarks, seconds, name, threads, links)


def written(benchmarks: Sequence[Microbenchmark], folder: Path) -> list[Path]:
    """An ONNX file of each."""
    paths = [folder / f"microbenchmark-{number}.onnx" for number in range(len(benchmarks))]
    for path, benchmark in zip(paths, benchmarks, strict=True):
        onnx.save(benchmark.model, path)
    return paths


def measured_by(
    benchmarks: Sequence[Microbenchmark], seconds: Array, name: str, threads: int, links: dict[str, Any]
) -> Measured:
    """What the times of microbenchmarks say, float64 (microbenchmarks,), of one call each; others as
    `measure_device`."""
    found = fit(benchmarks, seconds)
    content = profile_content(name, threads, links, found, copy_rate())
    return Measured(DeviceProfile.model_validate(content), found, tuple(b.name for b in benchmarks), seconds)


def copy_rate() -> float:
    """Bytes a second of copying memory, each byte counted once; the best of several times."""
    source = np.ones(COPIED // 8)
    target = np.empty_like(source)
    best = np.inf
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - started)
    return float(COPIED / best)


def profile_content(name: str, threads: int, links: dict[str, Any], found: Fit, copy: float) -> dict[str, Any]:
    """The profile as its file has it."""
    import onnxruntime

    rates = found.rates
    today = datetime.now(UTC).date().isoformat()
    source = f"measured on {today}: ONNX Runtime {onnxruntime.__version__}, {threads} thread{'s' * (threads > 1)}"

    def figure(value: float, unit: str, source: str = source) -> dict[str, Any]:
        return {"value": value, "unit": unit, "source": source}

    def rate(seconds: float, unit: str) -> dict[str, Any] | None:
        return figure(float(f"{1e-9 / seconds:.4g}"), unit) if seconds > 1 / FALLBACK_RATE else None

    def duration(seconds: float) -> dict[str, Any]:
        return figure(float(f"{seconds * 1e6:.4g}"), "us")

    classes = {
        kernel: present(
            rate=rate(rates.operation[i], "GFLOP/s"),
            bandwidth=rate(rates.byte[i], "GB/s"),
            overhead=duration(rates.overhead[i]),
            line=duration(rates.line[i]) if rates.line[i] > 0 else None,
        )
        for i, kernel in enumerate(CLASSES)
    }
    copied = float(f"{1e-9 * copy:.4g}")
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peak = rate(rates.operation[CLASSES.index("conv")], "GFLOP/s") or rate(1e-12, "GFLOP/s")
    spread = TO_DEVIATION * float(np.median(np.abs(found.residuals)))
    return {
        "format": "cahfp.profile/1",
        "name": name,
        "description": f"{processor()}, {threads} thread{'s' * (threads > 1)}, measured on {today}",
        "runtime": {"name": "onnxruntime", "provider": "CPUExecutionProvider", "threads": threads},
        "compute": {"fp32": {"peak": peak, "efficiency": figure(1.0, "share", "the peak is what convolutions reach")}},
        "memory": {
            "bandwidth": figure(2 * copied, "GB/s", f"twice the copy rate, {source}"),
            "copy_bandwidth": figure(copied, "GB/s", source),
            "cache": figure(rates.cache / 1e6, "MB", f"the size that explains the times best, {source}"),
        },
        "capacity": {
            "ram": figure(round(ram / 1e9, 3), "GB", "the operating system's figure"),
            "model_ram": figure(round(ram / 2e9, 3), "GB", "assumed: half of RAM"),
            "model_storage": figure(2.0, "GB", "assumed"),
        },
        "training": {"memory_factor": figure(4.0, "times", "assumed: weights, gradients, momentum, activations")},
        "links": links,
        "alignment": {"hard": figure(found.hard, "channels"), "step": figure(found.step, "channels")},
        "overheads": {
            "operator": duration(rates.overhead[CLASSES.index("conv")]),
            "call": duration(rates.call),
        },
        "calibration": classes
        | present(
            loads=rate(rates.load, "GFLOP/s"),
            waits=rate(rates.wait, "GFLOP/s"),
            reorder=rate(rates.reorder, "GB/s"),
            reorder_overhead=duration(rates.reorder_call),
            weights=rate(rates.weight, "GB/s"),
            used_once=rate(rates.once, "GB/s"),
            streaming=rate(rates.streaming, "GB/s"),
            spread=figure(min(max(round(spread, 4), 1e-4), 1.0), "share", "1.48 x median error of the fit"),
        ),
    }


def present(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def profile_toml(measured: Measured) -> str:
    """The profile as TOML, with the residuals of the fit as comments on top."""
    errors = np.abs(measured.fit.residuals)
    lines = [
        f"# Fit over {len(errors)} microbenchmarks: median error {np.median(errors):.1%}, 90% within "
        f"{np.quantile(errors, 0.9):.1%}, largest {errors.max():.1%} ({measured.names[int(errors.argmax())]}).",
    ]
    content = measured.profile.model_dump(mode="json", exclude_none=True)
    lines += [f"{key} = {toml_value(value)}" for key, value in content.items() if not isinstance(value, dict)]
    for key, value in content.items():
        if isinstance(value, dict):
            lines += toml_table(key, value)
    return "\n".join(lines) + "\n"


def toml_table(name: str, table: dict[str, Any]) -> list[str]:
    """A table with its figures in one line each, then the tables in it."""
    inner = {key: value for key, value in table.items() if isinstance(value, dict) and "unit" not in value}
    own = [f"{key} = {toml_value(value)}" for key, value in table.items() if key not in inner]
    lines = ["", f"[{name}]", *own] if own else []
    for key, value in inner.items():
        lines += toml_table(f"{name}.{key}", value)
    return lines


def toml_value(value: Any) -> str:
    """A value that may stand behind a key; strings as JSON writes them, which TOML reads too."""
    import json

    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml_value(own)}" for key, own in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
