"""Robust rules, clipping, the server's step, and the curvature rule, each against an independent computation."""

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.formats.factors import factor_product, unscaled
from cahfp_cli.formats.gathering import gather
from cahfp_cli.formats.index_map import without_factors as without
from cahfp_cli.reconstruction.curvature import CAP, FLOOR
from cahfp_cli.reconstruction.round import Step
from tests.support.clients_on_disk import bits, curvature, curvature_metadata, fleet, load, merge, places, save_global

quick = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))


def held(it, name: str) -> dict[tuple[int, ...], list[float]]:
    """Coordinate by coordinate, what the clients bring."""
    found: dict[tuple[int, ...], list[float]] = {}
    for mapping, submodel in zip(it.maps, it.submodels, strict=True):
        for inside, outside in places(mapping.tensors[name]):
            found.setdefault(outside, []).append(float(submodel[name][inside]))
    return found


def trimmed(values: list[float], share: float) -> float:
    cut = max(math.floor(share * len(values)), 1 if len(values) >= 3 else 0)
    return float(np.mean(sorted(values)[cut : len(values) - cut]))


@pytest.mark.parametrize(("rule", "options"), [("trimmed-mean", {}), ("trimmed-mean", {"trim": 0.4}), ("median", {})])
@given(seed=st.integers(0, 2**32), clients=st.integers(1, 7))
@quick
def test_robust_rules_take_each_coordinate_by_itself(rule, options, seed, clients):
    with tempfile.TemporaryDirectory() as folder:
        it = fleet(Path(folder), seed, clients)
        merged, _ = merge(it, rule, **options)
        for name, tensor in it.tensors.items():
            if tensor.dtype != np.float32:
                continue
            expected = tensor.astype(np.float64)
            for place, values in held(it, name).items():
                expected[place] = np.median(values) if rule == "median" else trimmed(values, options.get("trim", 0.2))
            np.testing.assert_allclose(merged[name], expected.astype(np.float32), rtol=3e-7, atol=1e-30)


@pytest.mark.parametrize("rule", ["fill", "covered", "trimmed-mean", "median", "curvature"])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_clients_that_did_not_train_change_nothing_under_any_rule(tmp_path, rule, dtype):
    it = fleet(tmp_path, 5, 4, dtype, trained=False)
    for folder, submodel in zip(it.folders, it.submodels, strict=True):
        curvature(folder, submodel, lambda name, tensor: np.ones(tensor.shape))
    merged, _ = merge(it, rule)
    if dtype == "F64":  # a mean of equal float64 numbers may be off by a bit
        for name, tensor in merged.items():
            np.testing.assert_allclose(tensor, it.tensors[name], rtol=1e-15)
    else:
        assert {name: bits(t) for name, t in merged.items()} == {name: bits(t) for name, t in it.tensors.items()}


def test_one_client_of_five_cannot_drag_a_trimmed_mean_or_a_median(tmp_path):
    it = fleet(tmp_path, 3, 5, full=True)
    honest, _ = merge(it, "median")
    evil = {name: t if t.dtype == np.int64 else t * np.float32(1e15) for name, t in it.submodels[0].items()}
    rewrite(it, 0, evil)
    for rule in ("median", "trimmed-mean"):
        merged, _ = merge(it, rule)
        for name, tensor in merged.items():
            values = np.stack([submodel[name] for submodel in it.submodels[1:]])
            assert (tensor >= values.min(0)).all(), name
            assert (tensor <= values.max(0)).all(), name
    dragged, _ = merge(it, "fill")
    assert np.abs(dragged["conv1.weight"]).max() > 1e12 > np.abs(honest["conv1.weight"]).max()


def rewrite(it, number: int, submodel: dict[str, np.ndarray]) -> None:
    from tests.support.clients_on_disk import save_client

    it.submodels[number] = submodel
    save_client(it.folders[number], submodel, it.maps[number], it.examples[number])


def norms(it, number: int, statistics: bool) -> tuple[float, float]:
    """Of a client's update, and of what it started from."""
    moved = before = 0.0
    for name, entry in it.maps[number].tensors.items():
        if it.tensors[name].dtype == np.int64 or ("running" in name) != statistics:
            continue
        for inside, outside in places(entry):
            old = float(it.tensors[name][outside])
            moved += (float(it.submodels[number][name][inside]) - old) ** 2
            before += old**2
    return math.sqrt(moved), math.sqrt(before)


@pytest.mark.parametrize("clip", [0.3, "median"])
def test_clipping_shrinks_updates_to_the_limit_weights_and_statistics_apart(tmp_path, clip):
    it = fleet(tmp_path, 7, 3, full=True)
    merged, report = merge(it, "covered", clip=clip)
    shrinks = []
    for statistics in (False, True):
        ratios = [moved / before for moved, before in (norms(it, number, statistics) for number in range(3))]
        limit = float(np.median(ratios)) if clip == "median" else clip
        shrinks.append([min(1.0, limit / ratio) for ratio in ratios])
    by_path = {client.path: client for client in report.clients}
    total = sum(it.examples)
    for number, folder in enumerate(it.folders):
        assert by_path[folder].shrink == pytest.approx((shrinks[0][number], shrinks[1][number]))
        assert by_path[folder].update.weights.moved == pytest.approx(norms(it, number, False)[0])
    for name in ("conv1.weight", "bn2.running_mean"):
        old = it.tensors[name].astype(np.float64)
        own = shrinks["running" in name]
        parts = [
            n * (old + s * (w[name].astype(np.float64) - old))
            for n, s, w in zip(it.examples, own, it.submodels, strict=True)
        ]
        np.testing.assert_allclose(merged[name], sum(parts) / total, rtol=1e-6)


def test_a_client_that_moved_too_far_is_refused_or_left_out(tmp_path):
    it = fleet(tmp_path, 7, 3)
    honest, _ = merge(it, folders=it.folders[1:])
    before = (tmp_path / "merged.safetensors").read_bytes()
    scaled = {
        n: t if t.dtype == np.int64 or "running" in n else t * np.float32(100) for n, t in it.submodels[0].items()
    }
    rewrite(it, 0, scaled)
    with pytest.raises(InputError, match=r"moved by .* times their norm"):
        merge(it, max_update=5.0)
    merged, report = merge(it, max_update=5.0, skip_invalid=True)
    assert (tmp_path / "merged.safetensors").read_bytes() == before
    assert [one.path for one in report.refused] == [it.folders[0]]
    assert "times their norm" in report.refused[0].reason
    assert {n: bits(t) for n, t in merged.items()} == {n: bits(t) for n, t in honest.items()}


def test_too_few_clients_left_are_an_error(tmp_path):
    it = fleet(tmp_path, 7, 2)
    (it.folders[0] / "submodel.safetensors").unlink()
    with pytest.raises(InputError, match=r"1 clients passed, and at least 2 must(.|\n)*no such file"):
        merge(it, skip_invalid=True, min_clients=2)
    (it.folders[1] / "submodel.safetensors").unlink()
    with pytest.raises(InputError, match="0 clients passed"):
        merge(it, skip_invalid=True)


def test_the_servers_step_is_that_of_heavy_ball_momentum(tmp_path):
    it = fleet(tmp_path, 9, 2)
    last = {n: t if t.dtype == np.int64 else t * np.float32(0.9) for n, t in it.tensors.items()}
    save_global(tmp_path / "before.safetensors", last)
    plain, _ = merge(it)
    merged, _ = merge(it, step=Step(0.5, 0.75, tmp_path / "before.safetensors"))
    for name, now in it.tensors.items():
        if now.dtype == np.int64 or "running" in name:
            assert bits(merged[name]) == bits(plain[name])
            continue
        old, new = now.astype(np.float64), plain[name].astype(np.float64)
        expected = old + 0.5 * (new - old) + 0.75 * (old - last[name].astype(np.float64))
        np.testing.assert_allclose(merged[name], expected, rtol=2e-6, atol=1e-7)


def test_steps_that_make_no_sense_are_refused(tmp_path):
    it = fleet(tmp_path, 9, 1)
    for numbers in ((0.0, 0.0, None), (1.0, 1.0, None), (1.0, 0.5, None), (1.0, 0.0, it.checkpoint)):
        with pytest.raises(UsageError, match=r"--server-"):
            Step(*numbers)
    save_global(tmp_path / "other.safetensors", {"w": np.zeros(3, np.float32)})
    with pytest.raises(InputError, match="its tensors are not those"):
        merge(it, step=Step(1.0, 0.5, tmp_path / "other.safetensors"))
    for options in ({"rule": "fill", "trim": 0.1}, {"rule": "trimmed-mean", "trim": 0.5}, {"clip": 0.0}):
        with pytest.raises(UsageError, match=r"--trim|--clip"):
            merge(it, **options)


def test_curvature_weighs_by_coordinate_but_never_a_client_as_a_whole(tmp_path):
    it = fleet(tmp_path, 9, 3)
    random = np.random.default_rng(0)
    found = [
        curvature(folder, submodel, lambda name, tensor, size=size: size * random.exponential(size=tensor.shape) ** 3)
        for folder, submodel, size in zip(it.folders, it.submodels, (1e-9, 1.0, 1e9), strict=True)
    ]
    merged, _ = merge(it, "curvature")
    for name, tensor in it.tensors.items():
        if tensor.dtype == np.int64 or "running" in name:
            continue
        above, below = np.zeros(tensor.shape), np.zeros(tensor.shape)
        for mapping, submodel, own, examples in zip(it.maps, it.submodels, found, it.examples, strict=True):
            relative = np.clip(own[name].astype(np.float64) / own[name].astype(np.float64).mean(), FLOOR, CAP)
            for inside, outside in places(mapping.tensors[name]):
                above[outside] += examples * relative[inside] * float(submodel[name][inside])
                below[outside] += examples * relative[inside]
        expected = np.where(below > 0, above / np.where(below > 0, below, 1), tensor)
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-7)


def test_curvature_of_compensated_weights_is_that_of_the_weights_without_factors(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    it = fleet(tmp_path / "a", 9, 3, compensated=True)
    random = np.random.default_rng(0)
    for folder, submodel in zip(it.folders, it.submodels, strict=True):
        curvature(folder, submodel, lambda name, tensor: random.exponential(size=tensor.shape))
    merged, _ = merge(it, "curvature")
    # The same weights without factors, with the curvature that they have then.
    plain = fleet(tmp_path / "b", 9, 3)
    for number, mapping in enumerate(it.maps):
        with_own = {
            name: unscaled(
                tensor, gather(it.tensors[name], without(mapping).tensors[name]), mapping.tensors[name].factors
            )
            if mapping.tensors[name].factors
            else tensor
            for name, tensor in it.submodels[number].items()
        }
        plain.examples[number], plain.maps[number] = it.examples[number], without(mapping)
        rewrite(plain, number, {name: np.asarray(t, it.submodels[number][name].dtype) for name, t in with_own.items()})
        with open_safetensors(it.folders[number] / "curvature.safetensors") as file:
            found = {name: file.read(name) for name in file.tensors}
        squares = {name: factor_product(mapping.tensors[name].factors) for name in found}
        curvature(
            plain.folders[number],
            plain.submodels[number],
            lambda name, tensor, found=found, squares=squares: (
                found[name] if squares[name] is None else found[name] * squares[name] ** 2
            ),
        )
    expected, _ = merge(plain, "curvature")
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fault", ["missing", "lacks", "shape", "negative", "nan", "integer", "wide", "other"])
def test_curvature_that_is_not_one_is_refused(tmp_path, fault):
    it = fleet(tmp_path, 9, 2)
    for folder, submodel in zip(it.folders, it.submodels, strict=True):
        made = curvature(folder, submodel, lambda name, tensor: np.ones(tensor.shape))
    path = it.folders[1] / "curvature.safetensors"
    if fault == "missing":
        path.unlink()
    else:
        bad = {
            "shape": np.ones(99, np.float32),
            "negative": -made["conv1.weight"],
            "nan": made["conv1.weight"] * np.nan,
        }
        bad["integer"] = made["conv1.weight"].astype(np.int32)
        bad["wide"] = made["conv1.weight"].astype(np.float64) * 1e308
        shape = made.pop("conv1.weight").shape
        if fault != "lacks":
            made["conv1.weight"] = bad.get(fault, np.ones(shape, np.float32))
        save_arrays(path, made, curvature_metadata("0" * 64 if fault == "other" else it.maps[1].checkpoint))
    with pytest.raises(InputError, match=r"curvature\.safetensors: "):
        merge(it, "curvature")
    merged, report = merge(it, "curvature", skip_invalid=True)
    assert [one.path for one in report.refused] == [it.folders[1]]
    alone, _ = merge(it, "curvature", folders=it.folders[:1])
    assert {n: bits(t) for n, t in merged.items()} == {n: bits(t) for n, t in alone.items()}


def test_the_audit_tells_who_pushes_backwards(tmp_path):
    it = fleet(tmp_path, 3, 4, full=True)
    step = {n: np.float32(0.1) * np.sign(t) for n, t in it.tensors.items() if t.dtype != np.int64}
    for number in range(4):
        sign = -1 if number == 3 else 1
        moved = {n: t if t.dtype == np.int64 or "running" in n else t + sign * step[n] for n, t in it.tensors.items()}
        it.examples[number] = 10
        rewrite(it, number, moved)
    _, report = merge(it, audit=True)
    found = {client.path: client.agreement for client in report.clients}
    assert [found[folder] for folder in it.folders] == pytest.approx([1, 1, 1, -1], abs=1e-4)
    assert load(tmp_path / "merged.safetensors")
