"""Kernel classes, rates and their calibration, against plain Python and against times that were made up from rates."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cahfp_cli.coupling.analysis import analyse
from cahfp_cli.device.calibration import features_of, fit, fit_with, with_cache
from cahfp_cli.device.catalogue import load_profile
from cahfp_cli.device.cost import compile_workload
from cahfp_cli.device.latency import CLASSES, Kernels, Quantities, Rates, rates_of
from cahfp_cli.device.measurement import profile_content
from cahfp_cli.device.microbenchmarks import Microbenchmark, microbenchmarks
from cahfp_cli.device.operators import Operator, Product
from cahfp_cli.device.profile import DeviceProfile
from cahfp_cli.device.sizes import Axis, Size
from cahfp_cli.device.workload import make_workload, share_touched, taps_inside
from tests.device.test_cost import small_net

BENCHMARKS = list(microbenchmarks())
IDLE = [CLASSES.index(name) for name in ("pool", "memory", "math", "clip", "view")]
LINED = ("odd", "pool")
LINKS = {name: {"value": 1.0, "unit": "Mbit/s", "source": "test"} for name in ("uplink", "downlink")}


def made_up(seed: int, cache: float) -> Rates:
    """Rates of a device that does not exist; each class has all its terms."""
    random = np.random.default_rng(seed)

    def some(low: float, high: float) -> np.ndarray:
        return np.exp(random.uniform(np.log(low), np.log(high), len(CLASSES)))

    operation, byte, overhead = 1 / some(1e9, 2e11), 1 / some(1e9, 1e11), some(1e-7, 1e-5)
    operation[IDLE] = 0.0  # they have no operations to be slow at
    byte[CLASSES.index("view")] = 0.0
    line = np.where(np.isin(CLASSES, LINED), some(1e-9, 1e-7), 0.0)
    return Rates(
        operation, byte, overhead, line, 1 / 3e10, 1 / 4e10, 1 / 2e10, 2e-6, 1 / 9e10, 1 / 2e10, 1 / 1.5e10, cache, 5e-6
    )


def times(rates: Rates, step: int, hard: int) -> np.ndarray:
    """Seconds of every microbenchmark on that device."""
    found = []
    for benchmark in BENCHMARKS:
        quantities = Kernels(benchmark.operators, 0, step, hard).quantities(np.zeros((1, 0)))
        found.append(sum(float(part.sum()) for part in rates.seconds(quantities)) + rates.call)
    return np.array(found)


def calibrated(rates: Rates, step: int, hard: int) -> DeviceProfile:
    """A profile that says so."""
    counted = features_of(BENCHMARKS, step, hard)
    found = replace(fit_with(counted, times(rates, step, hard), step, hard, rates.cache), rates=rates)
    return DeviceProfile.model_validate(profile_content("made-up", 1, LINKS, found, 1e10))


@pytest.mark.parametrize(("step", "hard", "cache"), [(16, 4, 4e6), (8, 1, 12e6), (4, 4, 1e6)])
@pytest.mark.parametrize("seed", range(3))
def test_a_fit_finds_the_alignment_and_the_times_of_a_device_that_was_made_up(
    step: int, hard: int, cache: float, seed: int
) -> None:
    rates = made_up(seed, cache)
    found = fit(BENCHMARKS, times(rates, step, hard))
    assert (found.step, found.hard, found.rates.cache) == (step, hard, cache)
    assert np.abs(found.residuals).max() < 1e-6
    predicted = times(found.rates, step, hard)
    np.testing.assert_allclose(predicted, times(rates, step, hard), rtol=1e-6)


def test_noise_of_the_times_does_not_change_the_alignment() -> None:
    noise = np.exp(np.random.default_rng(0).normal(0, 0.03, len(BENCHMARKS)))
    found = fit(BENCHMARKS, times(made_up(1, 4e6), 16, 4) * noise)
    assert (found.step, found.hard) == (16, 4)
    assert np.median(np.abs(found.residuals)) < 0.05


def test_a_fit_never_finds_a_negative_rate() -> None:
    seconds = np.random.default_rng(0).uniform(1e-6, 1e-3, len(BENCHMARKS))  # explained by nothing
    rates = fit(BENCHMARKS, seconds).rates
    for values in (rates.operation, rates.byte, rates.overhead, rates.line):
        assert (values >= 0).all()
    others = (rates.load, rates.wait, rates.reorder, rates.reorder_call, rates.weight, rates.once, rates.streaming)
    assert min(*others, rates.call) >= 0


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_what_a_microbenchmark_says_of_itself_is_what_its_onnx_file_computes(benchmark: Microbenchmark) -> None:
    onnx.checker.check_model(benchmark.model, full_check=True)
    model = onnx.shape_inference.infer_shapes(benchmark.model, strict_mode=True)
    shapes = {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in (*model.graph.input, *model.graph.value_info, *model.graph.output)
    }
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    macs = stored = 0
    for node in model.graph.node:
        out = int(np.prod(shapes[node.output[0]]))
        if node.op_type == "Conv":
            macs += out * int(np.prod(weights[node.input[1]][1:]))
            stored += int(np.prod(weights[node.input[1]]))
        if node.op_type == "MatMul":
            macs += out * weights[node.input[1]][0]
            stored += int(np.prod(weights[node.input[1]]))
    products = [operator.product for operator in benchmark.operators if operator.product is not None]
    sizes = [np.prod([axis.constant for axis in product.macs.axes]) for product in products]
    assert sum(sizes) == macs
    kernels = Kernels(benchmark.operators, 0, 1, 1).quantities(np.zeros((1, 0))).weights.sum()
    assert kernels == 4 * stored or ("1x1" in benchmark.name and kernels == pytest.approx(1.5 * 4 * stored / 9))
    assert len({benchmark.name for benchmark in BENCHMARKS}) == len(BENCHMARKS)


def test_every_rate_shows_in_some_microbenchmark() -> None:
    features = with_cache(features_of(BENCHMARKS, 16, 4), 4e6)
    unseen = [i for i in range(features.shape[1]) if not features[:, i].any()]
    without = [3 * len(CLASSES) + number for number, name in enumerate(CLASSES) if name not in LINED]
    assert unseen == [*IDLE, len(CLASSES) + CLASSES.index("view"), *without]  # a view moves no bytes


def one(kind: str, inputs: int, outputs: int, contracted: int, rows: int = 49, taps: int = 9) -> Quantities:
    """Of one operator, on images of one line, on a device of blocks of 16 and multiples of 4."""
    axes = (Axis(inputs), Axis(contracted), Axis(outputs))
    product = Product(Size((Axis(1), Axis(1), Axis(rows))), taps, *axes)
    read, written = Size((Axis(1), Axis(inputs), Axis(rows))), Size((Axis(1), Axis(outputs), Axis(rows)))
    weight = Size((Axis(outputs), Axis(contracted), Axis(taps)))
    operator = Operator("x", kind, (read,), (written,), (weight,), product)  # type: ignore[arg-type]
    return Kernels((operator,), 0, 16, 4).quantities(np.zeros((1, 0)))


@given(inputs=st.integers(1, 70), outputs=st.integers(1, 70), taps=st.sampled_from([1, 9]))
def test_the_kernel_of_a_convolution_depends_on_its_channels(inputs: int, outputs: int, taps: int) -> None:
    found = one("conv", inputs, outputs, inputs, taps=taps)
    up = lambda n: -(-n // 16) * 16  # noqa: E731
    if inputs < 16:
        expected, operations = "narrow", 49 * taps * inputs * up(outputs)
    elif inputs % 4 == 0:
        expected, operations = "conv", 49 * taps * up(inputs) * up(outputs)
    else:  # the image in blocks of 16 too
        expected, operations = "odd" if taps > 1 else "odd_pointwise", 64 * taps * inputs * outputs
    assert CLASSES[found.classes[0, 0]] == expected
    assert found.operations[0, 0] == 2 * operations
    unrolled = 49 * taps * inputs if expected == "odd" else 0
    assert found.moved[0, 0] == 4 * (49 * (inputs + outputs) + unrolled)
    assert found.calls[0, 0] == 1
    assert found.lines[0, 0] == (taps * inputs if expected == "odd" else 0)  # of an image of one line


@pytest.mark.parametrize(("channels", "expected", "calls"), [(96, "depthwise", 1), (95, "odd_depthwise", 95)])
def test_a_depthwise_convolution_of_an_odd_width_is_one_call_a_channel(
    channels: int, expected: str, calls: int
) -> None:
    found = one("depthwise", channels, channels, 1)
    assert CLASSES[found.classes[0, 0]] == expected
    assert found.calls[0, 0] == calls


@pytest.mark.parametrize(("own", "expected"), [(16, "conv"), (8, "odd")])
def test_groups_of_a_convolution_must_fill_blocks(own: int, expected: str) -> None:
    found = one("grouped", 4 * own, 4 * own, own)
    assert CLASSES[found.classes[0, 0]] == expected


def test_what_comes_in_blocks_and_is_wanted_plain_is_reordered_and_the_other_way_round() -> None:
    a = Axis(0, ((0, 1),))
    image = (Axis(1), Axis(1), Axis(10), Axis(10))

    def conv(inputs: Axis, outputs: Axis, source: int | None) -> Operator:
        read = Size((Axis(1), inputs, *image[2:]))
        return Operator("x", "conv", (read,), (), (), Product(Size(image), 9, inputs, inputs, outputs), (source,))

    net = (conv(Axis(3), a, None), conv(a, Axis(32), 0), conv(Axis(32), Axis(32), 1))
    kernels = Kernels(net, 1, 16, 4)
    quantities = kernels.quantities(np.array([[32.0], [33.0], [8.0]]))
    found = quantities.reordered / (4 * 100)
    assert found[0].tolist() == [0, 0, 0]
    assert found[1].tolist() == [0, 48 + 33, 32 + 32]  # out of blocks before the odd one, into blocks after it
    assert found[2].tolist() == [0, 16 + 8, 0]  # a narrow one reads plain channels and writes blocks
    assert (quantities.reorders == (found > 0)).all()


def test_pools_and_concatenations_take_blocks_only_of_channels_that_fill_them() -> None:
    a, eight = Axis(0, ((0, 1),)), Axis(8)
    image = (Axis(8), Axis(8))
    row = Size((Axis(1), *image))
    of = lambda axis: Size((Axis(1), axis, *image))  # noqa: E731
    both, sixteen = Axis(16, ((0, 1),)), Axis(16)
    net = (
        Operator("first", "conv", (of(eight),), (of(a),), (), Product(row, 9, eight, eight, a), (None,)),
        Operator("pool", "pool", (of(a),), (of(a),), sources=(0,), layout="whole"),
        Operator("second", "conv", (of(a),), (of(sixteen),), (), Product(row, 9, a, a, sixteen), (1,)),
        Operator("sum", "memory", (of(a), of(a)), (of(a),), sources=(0, 1), layout="same"),
        Operator("cat", "memory", (of(a), of(sixteen)), (of(both),), sources=(3, 2), layout="whole"),
        Operator("mean", "memory", (of(both),), (Size((Axis(1), both)),), sources=(4,)),
    )
    found = Kernels(net, 1, 16, 4).quantities(np.array([[32.0], [36.0]]))
    kinds = [[CLASSES[number] for number in row] for row in found.classes]
    assert kinds[0] == ["narrow", "memory", "conv", "memory", "memory", "memory"]
    assert kinds[1] == ["narrow", "pool", "conv", "memory", "memory", "memory"]
    # In blocks all the way to the mean; or plain from the pool on, which also the sum needs, once for both of them.
    assert found.reorders.tolist() == [[0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 1, 0]]
    assert found.reordered[1].tolist() == [0, 256 * (48 + 36), 256 * (48 + 36), 0, 256 * (16 + 16), 0]
    assert found.reordered[0, 5] == 256 * 2 * 48


@pytest.mark.parametrize(("outputs", "passes"), [(8, 1), (16, 1), (64, 1), (65, 2), (130, 3)])
def test_a_blocked_convolution_loads_its_inputs_once_for_four_blocks_of_outputs(outputs: int, passes: int) -> None:
    assert one("conv", 32, outputs, 32).loads[0, 0] == 49 * 9 * 32 * passes
    assert one("conv", 33, outputs, 33).loads[0, 0] == 0  # a matrix product blocks otherwise


@pytest.mark.parametrize(
    ("row", "taps", "stretches"),
    [
        *((1, 9, [1]), (2, 9, [1, 1]), (3, 9, [1, 1, 1]), (7, 9, [1, 1, 3, 2]), (8, 9, [1, 1, 6])),
        *((14, 9, [1, 1, 6, 6]), (28, 9, [1, 1, 6, 6, 6, 6, 2]), (1, 1, [1]), (7, 1, [6, 1]), (49, 1, [6] * 8 + [1])),
    ],
)
@pytest.mark.parametrize(("outputs", "sets"), [(16, [1]), (48, [3]), (64, [4]), (180, [4, 4, 4]), (70, [4, 1])])
def test_a_blocked_convolution_waits_for_sums_where_few_are_in_flight(
    row: int, taps: int, stretches: list[int], outputs: int, sets: list[int]
) -> None:
    idle = sum(max(8 - length * blocks, 0) for length in stretches for blocks in sets)
    assert sum(stretches) == row
    found = one("conv", 32, outputs, 32, rows=row, taps=taps)
    assert found.waits[0, 0] == pytest.approx(2 * taps * 32 * 16 * idle)
    assert one("conv", 33, outputs, 33, rows=row, taps=taps).waits[0, 0] == 0  # a matrix product


def test_pools_take_a_time_a_line_only_where_it_was_measured() -> None:
    a = Axis(0, ((0, 1),))
    image = Size((Axis(1), a, Axis(8), Axis(8)))
    pool = Operator("pool", "pool", (image,), (Size((Axis(1), a, Axis(4), Axis(4))),), sources=(None,), layout="whole")
    found = Kernels((pool,), 1, 16, 4).quantities(np.array([[20.0]]))
    assert (found.calls[0, 0], found.lines[0, 0]) == (1, 20 * 4)
    for profile in (load_profile("jetson"), load_profile("raspberry-pi-4")):
        assert not rates_of(profile).line.any()


def test_products_with_a_vector_use_each_weight_once() -> None:
    for kind, inputs in (("conv", 33), ("matmul", 32)):
        alone = one(kind, inputs, 48, inputs, rows=1)
        assert alone.once[0, 0] == alone.weights[0, 0] > 0
        assert one(kind, inputs, 48, inputs, rows=2).once[0, 0] == 0
    assert one("conv", 32, 48, 32, rows=1).once[0, 0] == 0


@pytest.mark.parametrize(
    ("height", "kernel", "stride", "padding", "expected"),
    [(2, 3, 1, 1, 4 / 6), (4, 3, 1, 1, 10 / 12), (8, 3, 2, 1, 11 / 12), (5, 1, 1, 0, 1.0), (1, 3, 1, 1, 1 / 3)],
)
def test_the_share_of_a_kernel_inside_the_image(
    height: int, kernel: int, stride: int, padding: int, expected: float
) -> None:
    lines = (height + 2 * padding - kernel) // stride + 1
    assert taps_inside(height, lines, kernel, stride, padding).mean() == pytest.approx(expected)


@pytest.mark.parametrize(("side", "kernel", "expected"), [(1, 3, 1 / 9), (2, 3, 1.0), (2, 5, 9 / 25), (9, 5, 1.0)])
def test_weights_that_meet_only_padding_are_not_read(side: int, kernel: int, expected: float) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(16, 16, kernel, padding=kernel // 2)
    analysis = analyse(torch.nn.Sequential(conv, torch.nn.Flatten()).eval(), (16, side, side))
    (product,) = [o.product for o in make_workload(analysis, {}).operators if o.product is not None]
    weight = conv.weight.detach().clone().requires_grad_()
    torch.nn.functional.conv2d(torch.ones(1, 16, side, side), weight, padding=kernel // 2).sum().backward()
    assert weight.grad is not None
    assert product.touched == pytest.approx(expected) == float((weight.grad != 0).double().mean())
    axis = taps_inside(side, side, kernel, 1, kernel // 2)
    assert share_touched(axis, axis) == product.touched


# --- a calibrated profile -------------------------------------------------------------------------------------------


def test_the_rates_of_a_profile_are_those_that_it_was_made_from() -> None:
    rates = made_up(2, 4e6)
    cost, net = compile_workload(small_net(), calibrated(rates, 16, 4)), small_net()
    widths = np.array([13, 30])
    quantities = Kernels(net.operators, 2, 16, 4).quantities(widths[None].astype(float))
    expected = sum(float(part.sum()) for part in rates.seconds(quantities)) + rates.call
    assert float(cost.cost(widths).latency_seconds) == pytest.approx(expected, rel=1e-3)  # four digits in the file


@given(seed=st.integers(0, 5), low=st.tuples(*[st.integers(1, 30)] * 2), more=st.tuples(*[st.integers(0, 12)] * 2))
def test_settled_widths_are_the_least_that_fast_kernels_take(
    seed: int, low: tuple[int, int], more: tuple[int, int]
) -> None:
    cost = compile_workload(small_net(), MADE_UP)
    widths = np.minimum(np.array(low), cost.full_widths)
    settled = cost.settled(widths)
    assert ((settled % 4 == 0) | (settled == cost.full_widths)).all()
    assert ((settled >= widths) & (settled - widths < 4)).all()
    assert (cost.settled(settled) == settled).all()
    assert (compile_workload(small_net(), load_profile("pi5")).settled(widths) == widths).all()  # paper knows no better


MADE_UP = calibrated(made_up(3, 4e6), 16, 4)
