"""The cost model against plain Python loops over the same network, and the properties that selection relies on."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cahfp_cli.device.catalogue import load_profile, profile_names
from cahfp_cli.device.cost import (
    CONTAINER_BYTES,
    CONTAINER_BYTES_PER_OPERATOR,
    compile_workload,
)
from cahfp_cli.device.operators import Operator, Product, Workload
from cahfp_cli.device.profile import DeviceProfile
from cahfp_cli.device.sizes import Axis, Size
from tests.support.networks import examples

pytestmark = pytest.mark.quick

IMAGE, POOLED, CLASSES = 12, 6, 10


def fixed(*lengths: int) -> tuple[Axis, ...]:
    return tuple(Axis(length) for length in lengths)


def small_net() -> Workload:
    """3x12x12 -> conv a -> norm -> relu -> depthwise a -> conv b, added to a 1x1 conv b -> pool -> linear on b*36."""
    a, b = Axis(0, ((0, 1),)), Axis(2, ((1, 1),))  # family 1 always keeps two channels beside its own
    image, pooled = fixed(IMAGE, IMAGE), fixed(POOLED, POOLED)
    flat = Axis(2 * POOLED * POOLED, ((1, POOLED * POOLED),))
    stem, wide = Size((a, *image)), Size((b, *image))
    small, out = Size((b, *pooled)), Size(fixed(CLASSES))
    w1, w2 = Size((a, *fixed(3, 3, 3))), Size((a, *fixed(1, 3, 3)))
    w3, w4, w5 = Size((b, a, *fixed(3, 3))), Size((b, a)), Size((Axis(CLASSES), flat))
    source = Size(fixed(3, IMAGE, IMAGE))
    rows, one, three = Size(image), Axis(1), Axis(3)
    operators = (
        Operator("conv1", "conv", (source,), (stem,), (w1,), Product(rows, 9, three, three, a)),
        Operator("norm1", "free", weights=(Size((a,)), Size((a,)))),
        Operator("depthwise", "depthwise", (stem,), (stem,), (w2,), Product(rows, 9, a, one, a), (0,)),
        Operator("conv2", "conv", (stem,), (wide,), (w3,), Product(rows, 9, a, a, b), (2,)),
        Operator("short", "conv", (stem,), (wide,), (w4,), Product(rows, 1, a, a, b), (2,)),
        Operator("add", "memory", (wide, wide), (wide,)),
        Operator("pool", "memory", (wide,), (small,)),
        Operator("linear", "matmul", (small,), (out,), (w5, out), Product(Size(()), 1, flat, flat, Axis(CLASSES))),
    )
    floats = (w1, w2, w3, w4, w5, out, Size((a,)), Size((a,)))
    parameters = (*((size, 4) for size in floats), (Size(()), 8))
    buffers = (source, stem, wide, small, out)
    live = ((0, 1), (1, 1), (1, 2), (1, 2, 2), (2, 2, 2), (2, 3), (3, 4))
    return Workload(operators, 2, (16, 30), parameters, buffers, live)


def brute_force(widths: tuple[int, int], profile: DeviceProfile) -> dict[str, float]:
    """The same network, written out by hand."""
    a, b = widths[0], widths[1] + 2
    step = profile.alignment.step.value if profile.alignment else 1
    ceil = lambda n: math.ceil(n / step) * step  # noqa: E731
    pixels, pooled = IMAGE * IMAGE, POOLED * POOLED
    source, stem, wide, small = 3 * pixels, a * pixels, b * pixels, b * pooled
    weights = [a * 27, a * 9, b * a * 9, b * a, 0, 0, CLASSES * b * pooled + CLASSES]
    macs = [a * 27 * pixels, a * 9 * pixels, b * a * 9 * pixels, b * a * pixels, 0, 0, CLASSES * b * pooled]
    deep = a if a < step else ceil(a)  # kernels for fewer channels than a step pad none of them
    padded = [
        ceil(a) * 27 * pixels,
        ceil(a) * 9 * pixels,
        ceil(b) * deep * 9 * pixels,
        ceil(b) * deep * pixels,
        0,
        0,
        ceil(CLASSES) * b * pooled,
    ]
    moved = [source + stem, 2 * stem, stem + wide, stem + wide, 3 * wide, wide + small, small + CLASSES]
    cache = profile.memory.cache.si if profile.memory.cache else 0
    size = 4 * sum(weights)
    streams = float(size > 0) if cache == 0 else min(max(0.0, size / cache - 1), 1.0)
    latency = profile.overheads.call.si
    for operations, activations, weight in zip(padded, moved, weights, strict=True):
        compute = 2 * operations / (profile.compute.fp32.peak.si * profile.compute.fp32.efficiency.si)
        memory = 4 * (activations + weight * streams) / profile.memory.reached
        latency += compute + memory + profile.overheads.operator.si
    stored = 4 * (sum(weights) + 2 * a) + 8
    steps = [source + stem, 2 * stem, stem + wide, stem + 2 * wide, 3 * wide, wide + small, small + CLASSES]
    return {
        "latency_seconds": latency,
        "memory_bytes": stored + 4 * max(steps),
        "storage_bytes": stored + CONTAINER_BYTES + 8 * CONTAINER_BYTES_PER_OPERATOR,
        "macs": sum(macs),
        "params": sum(weights) + 2 * a + 1,
    }


@pytest.mark.parametrize("name", profile_names())
@pytest.mark.parametrize("widths", [(16, 30), (1, 1), (5, 13), (8, 30), (0, 0), (15, 2)])
def test_costs_equal_a_computation_by_hand(name: str, widths: tuple[int, int]) -> None:
    profile = load_profile(name)
    cost = compile_workload(small_net(), profile).cost(np.array(widths))
    for field, expected in brute_force(widths, profile).items():
        assert getattr(cost, field).shape == ()
        assert float(getattr(cost, field)) == pytest.approx(expected, rel=1e-12), field


def test_both_sides_of_the_cache_are_met_by_the_test_above() -> None:
    full = 4.0 * (16 * 27 + 16 * 9 + 32 * 16 * 9 + 32 * 16 + CLASSES * 32 * 36 + CLASSES)
    caches = {profile.memory.cache.si for profile in map(load_profile, profile_names()) if profile.memory.cache}
    assert min(caches) < full < max(caches)


def test_a_batch_gives_exactly_what_its_rows_give() -> None:
    model = compile_workload(small_net(), load_profile("pi5"))
    batch = np.array([(16, 30), (3, 7), (1, 1)])
    together = model.cost(batch)
    for row, widths in enumerate(batch):
        alone = model.cost(widths)
        for field in ("latency_seconds", "memory_bytes", "storage_bytes", "macs", "params"):
            assert getattr(together, field).shape == (3,)
            assert getattr(together, field)[row] == getattr(alone, field)


def test_the_breakdown_adds_up_to_the_latency_and_free_operators_take_none() -> None:
    model = compile_workload(small_net(), load_profile("stm32"))
    widths = np.array([(16, 30), (4, 4)])
    breakdown = model.breakdown(widths)
    assert breakdown.names[1] == "norm1"
    assert breakdown.seconds.shape == (2, 8)
    assert (breakdown.seconds[:, 1] == 0).all()
    assert (np.delete(breakdown.seconds, 1, axis=1) > 0).all()
    total = breakdown.seconds.sum(axis=-1) + breakdown.call_overhead
    np.testing.assert_allclose(total, model.cost(widths).latency_seconds, rtol=1e-12)
    assert model.breakdown(widths[0]).seconds.shape == (8,)


def test_without_a_profile_there_is_everything_but_latency() -> None:
    model, widths = compile_workload(small_net(), None), np.array([5, 13])
    cost, with_profile = model.cost(widths), compile_workload(small_net(), load_profile("pi5")).cost(widths)
    assert cost.latency_seconds is None
    assert (cost.memory_bytes, cost.storage_bytes, cost.macs, cost.params) == (
        with_profile.memory_bytes,
        with_profile.storage_bytes,
        with_profile.macs,
        with_profile.params,
    )
    with pytest.raises(ValueError, match="no latency"):
        model.breakdown(widths)


@given(
    name=st.sampled_from(profile_names()),
    low=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    more=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
@examples(100)
def test_keeping_more_never_costs_less(name: str, low: tuple[int, int], more: tuple[int, int]) -> None:
    model = compile_workload(small_net(), load_profile(name))
    small = model.cost(np.array(low))
    large = model.cost(np.array(low) + np.array(more))
    for field in ("latency_seconds", "memory_bytes", "storage_bytes", "macs", "params"):
        assert getattr(small, field) <= getattr(large, field), field


def test_alignment_makes_a_staircase_of_compute() -> None:
    profile = load_profile("n100")  # steps of 8
    model = compile_workload(small_net(), profile)
    widths = np.array([(n, 30) for n in range(1, 25)])
    compute = model.breakdown(widths).compute[:, 3]
    assert (np.diff(compute[:7]) > 0).all()  # fewer channels than a step: each counts
    assert len(set(compute[7:8])) == len(set(compute[8:16])) == len(set(compute[16:24])) == 1
    assert compute[8] == pytest.approx(2 * compute[7])


def test_a_network_of_nothing_costs_its_container() -> None:
    model = compile_workload(Workload((), 0, (), ()), load_profile("stm32"))
    assert model.breakdown(np.zeros(0)).seconds.shape == (0,)
    cost = model.cost(np.zeros(0))
    assert (cost.latency_seconds, cost.memory_bytes, cost.storage_bytes) == (0, 0, CONTAINER_BYTES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"full_widths": (1,)}, "1 full widths"),
        ({"families": 1, "full_widths": (1,)}, "beyond 1"),
        ({"live": ((9,),)}, "a buffer that is not there"),
        ({"operators": (Operator("x", "softmax"),)}, "unknown kind 'softmax'"),  # type: ignore[arg-type]
        ({"buffers": (Size((Axis(8, ((0, -1),)),)),) * 5}, "shrinks"),
    ],
)
def test_a_workload_that_contradicts_itself_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_workload(replace(small_net(), **change), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2), ()])
def test_widths_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2 families"):
        compile_workload(small_net(), None).cost(np.ones(shape))
