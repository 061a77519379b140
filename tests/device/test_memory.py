"""The arena model against planning one network at a time in plain Python, and against ONNX Runtime itself."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cahfp_cli.coupling.analysis import analyse, cut
from cahfp_cli.device.arena import COLUMN_BYTES, Arena, Layout, Schedule, Step, Tensor
from cahfp_cli.device.catalogue import load_profile
from cahfp_cli.device.cost import compile_workload
from cahfp_cli.device.sizes import Axis, Size
from cahfp_cli.device.workload import make_workload
from cahfp_cli.export.onnx_file import export_onnx
from cahfp_cli.models.resnet import resnet20

BENCH = Path(__file__).parents[2] / "scripts" / "bench_memory.py"
SIDE = 8


def image(family: int | None, channels: int = 3) -> Tensor:
    """Channels of one family, or fixed, by 8x8."""
    axis = Axis(channels) if family is None else Axis(0, ((family, 1),))
    return Tensor((Axis(1), axis, Axis(SIDE), Axis(SIDE)), 4)


def nbytes(channels: int) -> int:
    return 4 * channels * SIDE * SIDE


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, list[int]]:
    """Elementwise kernels of one or two earlier tensors each, and widths of three families."""
    count = draw(st.integers(2, 9))
    tensors = [image(None)] + [image(draw(st.integers(0, 2))) for _ in range(count)]
    steps = [
        Step("plain", tuple(draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=2))), (n,))
        for n in range(1, count + 1)
    ]
    widths = [draw(st.sampled_from([1, 2, 3, 5, 8])) for _ in range(3)]
    return Schedule(tuple(tensors), tuple(steps), frozenset({0}), frozenset()), widths


def planned(schedule: Schedule, widths: list[int]) -> int:
    """Height of the plan of one candidate: buffers by shape, then the tightest hole, with lists and loops."""
    channels = [t.axes[1].constant + sum(m * widths[f] for f, m in t.axes[1].terms) for t in schedule.tensors]
    last = {n: n for n in range(len(channels))}  # step n writes tensor n + 1
    for number, step in enumerate(schedule.steps):
        last[step.outputs[0]] = number
    for number, step in enumerate(schedule.steps):
        for tensor in step.inputs:
            last[tensor] = number
    buffer: dict[int, int] = {}
    free: list[int] = []
    for number, step in enumerate(schedule.steps):
        out = step.outputs[0]
        match = next((b for b in free if channels[b] == channels[out]), None)
        if match is not None:
            free.remove(match)
        buffer[out] = out if match is None else match
        dead = [t for t in [*buffer] if last[t] == number]
        for tensor in dead:
            free.insert(0, buffer[tensor])
    until = {b: max(last[t] for t in buffer if buffer[t] == b) for b in buffer.values()}
    height, held = 0, []
    for number, step in enumerate(schedule.steps):
        out = step.outputs[0]
        if buffer[out] == out:
            size, edge, holes = nbytes(channels[out]), 0, []
            for start, end, _ in sorted(held):
                holes.append((start - edge, edge))
                edge = end
            holes.append((height - edge, edge))
            start = min((hole for hole in holes if hole[0] >= size), default=(0, edge))[1]
            held.append((start, start + size, out))
            height = max(height, start + size)
        held = [block for block in held if until[block[2]] > number]
    return height


def live_at_once(schedule: Schedule, widths: list[int]) -> int:
    """The largest sum of what is written and still read."""
    sizes = [nbytes(t.axes[1].constant + sum(m * widths[f] for f, m in t.axes[1].terms)) for t in schedule.tensors]
    peaks = []
    for number, step in enumerate(schedule.steps):
        later = {t for following in schedule.steps[number:] for t in following.inputs}
        written = {s.outputs[0] for s in schedule.steps[:number]}
        peaks.append(sum(sizes[t] for t in (later & written) | set(step.outputs)))
    return max(peaks)


@given(drawn=schedules())
def test_the_plan_equals_one_made_with_lists_and_loops(drawn: tuple[Schedule, list[int]]) -> None:
    schedule, widths = drawn
    found = Arena(schedule, 3, Layout())(np.array([widths], float))[0] - nbytes(3)
    assert found == planned(schedule, widths)
    assert found >= live_at_once(schedule, widths)


@given(drawn=schedules(), seed=st.integers(0, 99))
def test_a_batch_gives_exactly_what_its_rows_give(drawn: tuple[Schedule, list[int]], seed: int) -> None:
    arena = Arena(drawn[0], 3, Layout(8, 4))
    batch = np.random.default_rng(seed).integers(1, 40, (5, 3)).astype(float)
    assert arena(batch).tolist() == [arena(row[None])[0] for row in batch]


def two_convolutions(cin: int) -> Schedule:
    """image -> conv a -> conv b, the second with a column matrix."""
    tensors = (image(None, cin), image(0), image(1))
    square, kernel = (Axis(SIDE), Axis(SIDE)), (Axis(3), Axis(3))
    a, b = Axis(0, ((0, 1),)), Axis(0, ((1, 1),))
    steps = (
        Step("conv", (0,), (1,), (Size((Axis(cin), *kernel)), Size((a,)), Size(square))),
        Step("conv", (1,), (2,), (Size((a, *kernel)), Size((b,)), Size(square))),
    )
    return Schedule(tensors, steps, frozenset({0}), frozenset())


@pytest.mark.parametrize(
    ("widths", "layout", "expected"),
    [
        # Plain: two tensors and one thread's columns, or the whole matrix where there are more filters than pixels.
        ((12, 20), Layout(), nbytes(12) + nbytes(20) + COLUMN_BYTES),
        ((12, 20), Layout(threads=4), nbytes(12) + nbytes(20) + 4 * COLUMN_BYTES),
        ((64, 65), Layout(), nbytes(64) + nbytes(65) + 64 * 9 * SIDE * SIDE * 4),
        # Blocks of 8: both are padded; 12 channels are a multiple of 4, so the second reads blocks.
        ((12, 20), Layout(8, 4), nbytes(16) + nbytes(24)),
        # 13 are not: put in order, the padded one left, and the second is plain, in the hole if it fits.
        ((13, 20), Layout(8, 4), nbytes(16) + nbytes(13) + nbytes(20) + COLUMN_BYTES),
        ((13, 16), Layout(8, 4), nbytes(16) + nbytes(13) + COLUMN_BYTES),
        # Fewer than a block are read as they are.
        ((5, 20), Layout(8, 4), nbytes(8) + nbytes(5) + nbytes(24)),
    ],
)
def test_two_convolutions_take_what_is_counted_by_hand(widths: tuple[int, int], layout: Layout, expected: int) -> None:
    assert Arena(two_convolutions(3), 2, layout)(np.array([widths], float))[0] == expected + nbytes(3)


def test_a_sum_is_added_in_place_where_the_convolution_is_blocked() -> None:
    tensors = (image(None), image(0), image(0), image(0))
    steps = (Step("conv", (0,), (1,)), Step("conv", (1,), (2,)), Step("join", (2, 1), (3,), fuses=0))
    arena = Arena(Schedule(tensors, steps, frozenset({0}), frozenset()), 1, Layout(8, 4))
    # The convolution reads what its result is added to, so the sum needs no place of its own.
    assert arena(np.array([[16.0]]))[0] == nbytes(16) + nbytes(3)
    assert arena(np.array([[13.0]]))[0] > 2 * nbytes(16)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 24), (24, 40), (40, 24)))
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + self.b(torch.relu(self.a(x)))).mean((2, 3)))


def flags() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.exists() else ""


@pytest.mark.skipif("avx2" not in flags(), reason="the block of channels is known for x86 with AVX2 or AVX-512 only")
@pytest.mark.parametrize(
    ("builder", "multiple"), [(Residual, 1), (Residual, 4), (lambda: resnet20((3, 32, 32), 10), 1)]
)
def test_within_a_tenth_of_what_onnx_runtime_holds(builder: object, multiple: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, shape = builder().eval(), (3, 32, 32)  # type: ignore[operator]
    analysis = analyse(model, shape)
    groups, rng = analysis.groups, np.random.default_rng(5)
    kept = np.ones(groups.count, bool)
    for family in range(len(groups.names)):
        members = np.flatnonzero(groups.family == family)
        kept[members[max(multiple, int(len(members) * rng.uniform(0.4, 1)) // multiple * multiple) :]] = False
    profile = load_profile("n100")
    assert profile.alignment is not None
    step = profile.alignment.step.model_copy(update={"value": 16 if "avx512f" in flags() else 8})
    alignment = profile.alignment.model_copy(update={"step": step})
    runtime = profile.runtime.model_copy(update={"threads": 1})
    profile = profile.model_copy(update={"alignment": alignment, "runtime": runtime})
    model_of = compile_workload(make_workload(analysis, dict.fromkeys(model.state_dict(), 4)), profile)
    predicted = float(model_of.cost(groups.widths(kept)).activation_bytes) - 4 * math.prod(shape)
    export_onnx(cut(model, analysis, kept)[0], shape, tmp_path / "net.onnx", {})
    command = [sys.executable, str(BENCH), "--measure", str(tmp_path), "exact"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])["peak"]
    assert predicted == pytest.approx(measured, rel=0.1)
