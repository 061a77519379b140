"""Factors that compensate a submodel for what was removed reach the global checkpoint only if that is asked for."""

import tempfile
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cahfp_cli.checkpoint.digest import arrays_digest, content_digest
from cahfp_cli.checkpoint.dtypes import DTYPES
from cahfp_cli.errors import InputError
from cahfp_cli.formats.index_map import IndexMap, TensorMap, without_factors
from cahfp_cli.reconstruction.merge import reconstruct
from tests.support.clients_on_disk import (
    PROVENANCE,
    Fleet,
    bits,
    fleet,
    load,
    merge,
    oracle,
    places,
    save_client,
    save_global,
)

FLOATS = ["F16", "BF16", "F32", "F64"]
BOTH_RULES = pytest.mark.parametrize("rule", ["fill", "covered"])
quick = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def factor_at(entry: TensorMap, place: tuple[int, ...]) -> float:
    return float(
        np.prod([float(along[i]) for along, i in zip(entry.factors, place, strict=False) if along is not None])
    )


def uncompensated(it: Fleet) -> Fleet:
    """The fleet as it would have been without factors, one number at a time in float64."""
    submodels = []
    for mapping, submodel in zip(it.maps, it.submodels, strict=True):
        restored = dict(submodel)
        for name, entry in mapping.tensors.items():
            if not entry.factors:
                continue
            kind = it.tensors[name].dtype
            wide = np.float64 if kind == np.float64 else np.float32
            restored[name] = np.zeros(entry.submodel_shape)
            for inside, outside in places(entry):
                factor, before, after = factor_at(entry, inside), it.tensors[name][outside], submodel[name][inside]
                start = (wide(before) * wide(factor)).astype(kind)
                move = float(after) - float(start)
                value = float(after) if factor == 1 else float(before) + move / factor
                restored[name][inside] = float(before) if move == 0 else value
        submodels.append(restored)
    return replace(it, submodels=submodels)


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return {name: bits(tensor) for name, tensor in left.items()} == {name: bits(t) for name, t in right.items()}


def blocks_of(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for module in ("cahfp_cli.checkpoint.digest", "cahfp_cli.reconstruction.round"):
        monkeypatch.setattr(f"{module}.BLOCK_BYTES", size)


@BOTH_RULES
@pytest.mark.parametrize("dtype", FLOATS)
@given(
    seed=st.integers(0, 2**32),
    clients=st.integers(1, 4),
    block=st.sampled_from([1, 60, 1 << 20]),
    reverse=st.booleans(),
)
@quick
def test_untouched_compensated_submodels_leave_the_global_checkpoint_bit_identical(
    rule, dtype, seed, clients, block, reverse
):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        it = fleet(Path(folder), seed, clients, dtype, trained=False, compensated=True)
        blocks_of(monkeypatch, block)
        merged, report = merge(it, rule, folders=it.folders[::-1] if reverse else it.folders)
        assert same(merged, it.tensors)
        assert report.digest == arrays_digest(it.tensors)


@BOTH_RULES
@given(seed=st.integers(0, 2**32), clients=st.integers(1, 4))
@quick
def test_moved_entries_equal_an_independent_float64_computation_within_one_ulp(rule, seed, clients):
    with tempfile.TemporaryDirectory() as folder:
        it = fleet(Path(folder), seed, clients, compensated=True, moved=0.5)
        merged, _ = merge(it, rule)
        plain = uncompensated(it)
        for name, tensor in merged.items():
            if tensor.dtype == np.float32:
                expected = oracle(plain, rule, name).astype(np.float32)
                assert np.all(np.abs(tensor - expected) <= np.spacing(np.abs(expected))), name


@BOTH_RULES
@pytest.mark.parametrize("dtype", FLOATS)
@given(seed=st.integers(0, 2**32))
@quick
def test_one_full_coverage_client_becomes_itself_without_its_factors_bit_for_bit(rule, dtype, seed):
    with tempfile.TemporaryDirectory() as folder:
        it = fleet(Path(folder), seed, 1, dtype, full=True, compensated=True, moved=0.5)
        merged, _ = merge(it, rule)
        expected = uncompensated(it).submodels[0]
        assert same(merged, {name: tensor.astype(it.tensors[name].dtype) for name, tensor in expected.items()})


@BOTH_RULES
@given(seed=st.integers(0, 2**32), order=st.permutations(range(4)), block=st.sampled_from([1, 60, 300]))
@quick
def test_neither_the_order_of_clients_nor_the_size_of_blocks_changes_the_bytes(rule, seed, order, block):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        it = fleet(Path(folder), seed, 4, compensated=True, moved=0.5)
        output = it.checkpoint.parent / "merged.safetensors"
        merge(it, rule)
        first = output.read_bytes()
        blocks_of(monkeypatch, block)
        merge(it, rule, folders=[it.folders[i] for i in order])
        assert output.read_bytes() == first


@BOTH_RULES
def test_clients_that_differ_in_their_factors_alone_are_merged_in_any_order_to_the_same_bytes(tmp_path, rule):
    random = np.random.default_rng(0)
    tensors = {"w": random.normal(size=(40, 30))}
    save_global(tmp_path / "global.safetensors", tensors)
    trained = {"w": random.normal(size=(40, 30))}
    folders = []
    for number in range(5):
        factors = (None, np.exp2(random.uniform(-2, 2, 30)).astype(np.float32))
        mapping = IndexMap(arrays_digest(tensors), {"w": TensorMap((40, 30), "F64", (None, None), factors)})
        folders.append(save_client(tmp_path / f"c{number}", trained, mapping, 7))
    results = set()
    for number in range(5):  # names say nothing: each client is called by each of the names once
        renamed = [tmp_path / f"n{(place + number) % 5}" for place in range(5)]
        for old, new in zip(folders, renamed, strict=True):
            old.rename(new)
        out = tmp_path / "out.safetensors"
        reconstruct(tmp_path / "global.safetensors", renamed, out, rule=rule, provenance=PROVENANCE, force=True)
        results.add(content_digest(out))
        for old, new in zip(folders, renamed, strict=True):
            new.rename(old)
    assert len(results) == 1


@BOTH_RULES
@pytest.mark.parametrize("dtype", FLOATS)
def test_coordinates_without_a_factor_are_what_they_are_without_factors_bit_for_bit(tmp_path, rule, dtype):
    it = fleet(tmp_path, 21, 2, dtype, widths=(3, 12, 10), compensated=True, moved=0.5)
    merged, _ = merge(it, rule)
    for folder, submodel, mapping, examples in zip(it.folders, it.submodels, it.maps, it.examples, strict=True):
        save_client(folder, submodel, without_factors(mapping), examples)
    plain, _ = merge(it, rule)
    compared = differing = 0
    for name, tensor in merged.items():
        factors: dict[tuple[int, ...], set[float]] = {}
        for mapping in it.maps:
            entry = mapping.tensors[name]
            for inside, outside in places(entry):
                factors.setdefault(outside, set()).add(factor_at(entry, inside) if entry.factors else 1.0)
        for place in np.ndindex(tensor.shape):
            if factors.get(place, {1.0}) == {1.0}:
                assert bits(tensor[place]) == bits(plain[name][place]), (name, place)
                compared += bool(it.maps[0].tensors[name].factors)
            else:
                differing += bits(tensor[place]) != bits(plain[name][place])
    assert compared > 50  # of tensors that have factors
    assert differing > 50


@BOTH_RULES
def test_running_statistics_are_pooled_around_the_same_means(tmp_path, rule):
    it = fleet(tmp_path, 21, 3, compensated=True)
    merged, _ = merge(it, rule)
    for name in ("bn1.running_mean", "bn1.running_var", "bn2.running_mean", "bn2.running_var"):
        expected = oracle(it, rule, name).astype(np.float32)
        assert np.all(np.abs(merged[name] - expected) <= np.spacing(np.abs(expected)))


@BOTH_RULES
@given(seed=st.integers(0, 2**32), clients=st.integers(1, 3))
@quick
def test_kept_compensation_merges_the_weights_as_they_are(rule, seed, clients):
    with tempfile.TemporaryDirectory() as folder:
        it = fleet(Path(folder), seed, clients, compensated=True, moved=0.5)
        kept, report = merge(it, rule, keep_compensation=True)
        assert report.keep_compensation
        for directory, submodel, mapping, examples in zip(it.folders, it.submodels, it.maps, it.examples, strict=True):
            save_client(directory, submodel, without_factors(mapping), examples)
        plain, report = merge(it, rule)
        assert not report.keep_compensation
        assert same(kept, plain)
        for name, tensor in kept.items():
            if tensor.dtype == np.float32:
                expected = oracle(it, rule, name).astype(np.float32)
                assert np.all(np.abs(tensor - expected) <= np.spacing(np.abs(expected))), name


def one_weight(folder: Path, dtype: str, original: list[float], trained: list[float], factors: list[float]) -> Path:
    """A client of one tensor (1, n), beside its checkpoint in `folder`."""
    kind = DTYPES[dtype]
    tensors = {"w": np.array([original], kind)}
    save_global(folder / "global.safetensors", tensors)
    entry = TensorMap((1, len(original)), dtype, (None, None), (None, np.array(factors, np.float32)))
    return save_client(
        folder / "client", {"w": np.array([trained], kind)}, IndexMap(arrays_digest(tensors), {"w": entry})
    )


@pytest.mark.parametrize("dtype", [*FLOATS, "F8_E4M3", "F8_E5M2"])
def test_a_number_that_grows_beyond_its_dtype_without_its_factor_is_refused(tmp_path, dtype):
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    client = one_weight(tmp_path, dtype, [0, 0], [1, largest], [1, 0.25])
    (tmp_path / "out").mkdir()
    for rule in ("fill", "covered"):
        with pytest.raises(InputError, match=f"'w' has numbers too large for {dtype}") as error:
            reconstruct(
                tmp_path / "global.safetensors", [client], tmp_path / "out" / "x", rule=rule, provenance=PROVENANCE
            )
        assert str(tmp_path / "global.safetensors") in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []
    reconstruct(
        tmp_path / "global.safetensors", [client], tmp_path / "kept", keep_compensation=True, provenance=PROVENANCE
    )
    assert load(tmp_path / "kept")["w"].tolist() == [[1, largest]]


@pytest.mark.parametrize("other_first", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, "F8_E4M3", "F8_E5M2"])
def test_a_factor_that_the_checkpoint_itself_does_not_bear_is_refused(tmp_path, dtype, other_first):
    """No prune makes such a map: its submodel would hold infinities. Another, sound client must not hide it."""
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    client = one_weight(tmp_path, dtype, [0, largest], [1, 1], [1, 4])
    tensors = load(tmp_path / "global.safetensors")
    whole = IndexMap(arrays_digest(tensors), {"w": TensorMap((1, 2), dtype, (None, None))})
    changed = {"w": np.array([[3 if other_first else 0.5, 1]], DTYPES[dtype])}
    sound = save_client(tmp_path / "sound", changed, whole)
    for folders in ([client], [client, sound]):
        with pytest.raises(InputError, match=f"'w' has numbers too large for {dtype}"):
            reconstruct(tmp_path / "global.safetensors", folders, tmp_path / "out", provenance=PROVENANCE)
    assert not (tmp_path / "out").exists()


def test_a_number_that_is_too_large_without_its_factor_is_refused(tmp_path):
    """Averaged with others it might fit, but one such client of a few could make the result too large."""
    client = one_weight(tmp_path, "F16", [0.0], [30000.0], [0.25])
    tensors = load(tmp_path / "global.safetensors")
    whole = IndexMap(arrays_digest(tensors), {"w": TensorMap((1, 1), "F16", (None, None))})
    other = save_client(tmp_path / "other", tensors, whole, 30)
    both, out = [client, other], tmp_path / "out"
    with pytest.raises(InputError, match="too large for F16"):
        reconstruct(tmp_path / "global.safetensors", both, out, provenance=PROVENANCE)
    report = reconstruct(tmp_path / "global.safetensors", both, out, provenance=PROVENANCE, skip_invalid=True)
    assert [one.path for one in report.refused] == [client] and load(out)["w"].tolist() == [[0.0]]


def test_factors_of_rows_go_with_their_rows(tmp_path, monkeypatch):
    random = np.random.default_rng(3)
    tensors = {"w": random.normal(size=(50, 4)).astype(np.float32)}
    save_global(tmp_path / "global.safetensors", tensors)
    rows = np.array([1, 2, 3, 10, 11, 30, 49], np.int32)
    factors = np.array([2, 0.5, 4, 0.25, 1, 2, 0.5], np.float32)
    whole_factors = np.exp2(random.integers(-2, 3, 50)).astype(np.float32)
    some = IndexMap(arrays_digest(tensors), {"w": TensorMap((50, 4), "F32", (rows, None), (factors, None))})
    whole = IndexMap(arrays_digest(tensors), {"w": TensorMap((50, 4), "F32", (None, None), (whole_factors, None))})
    # Powers of two: everything is exact.
    a = save_client(tmp_path / "a", {"w": tensors["w"][rows] * factors[:, None] + np.float32(0.25)}, some, 1)
    b = save_client(tmp_path / "b", {"w": tensors["w"] * whole_factors[:, None]}, whole, 1)
    moved = np.zeros(50)
    moved[rows] = 0.25 / factors / 2
    for block in (1, 16, 17, 100, 1 << 20):
        blocks_of(monkeypatch, block)
        out = tmp_path / f"out{block}"
        reconstruct(tmp_path / "global.safetensors", [a, b], out, provenance=PROVENANCE)
        np.testing.assert_allclose(load(out)["w"], tensors["w"] + moved[:, None], rtol=0, atol=1e-6)
        untouched = np.setdiff1d(np.arange(50), rows)
        assert bits(load(out)["w"][untouched]) == bits(tensors["w"][untouched])
