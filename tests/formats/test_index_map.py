"""Gather and scatter are exact inverses, with factors too, and a map file that is damaged or lies is refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cahfp_cli.checkpoint.dtypes import DTYPES, FLOATS
from cahfp_cli.checkpoint.metadata import Provenance
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError
from cahfp_cli.formats.factors import scaled, unscaled
from cahfp_cli.formats.gathering import gather, scatter
from cahfp_cli.formats.index_map import IndexMap, TensorMap, check_against, without_factors
from cahfp_cli.formats.index_map_file import most_bytes, read_index_map, write_index_map

PROVENANCE = Provenance(tool="cahfp 0", command="test")
DIGEST = "0" * 64


@st.composite
def tensor_maps(draw):
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    axes = []
    for length in shape:
        kept = draw(st.none() | st.sets(st.integers(0, length - 1), max_size=length) if length else st.none())
        axes.append(None if kept is None else np.array(sorted(kept), np.int32))
    return TensorMap(shape, draw(st.sampled_from(list(DTYPES))), tuple(axes))


def random_bits(entry: TensorMap, shape: tuple[int, ...], seed: int) -> np.ndarray:
    dtype = DTYPES[entry.dtype]
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if entry.dtype == "BOOL" else 256, size, np.uint8)
    return raw.view(dtype).reshape(shape)


@given(entry=tensor_maps(), seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_gather_after_scatter_is_bit_exact_and_touches_nothing_else(entry, seed):
    before = random_bits(entry, entry.shape, seed)
    small = random_bits(entry, entry.submodel_shape, seed + 1)
    into = before.copy()
    scatter(small, entry, into)
    gathered = gather(into, entry)
    assert gathered.tobytes() == small.tobytes()
    assert gathered.dtype == small.dtype
    assert gathered.shape == entry.submodel_shape
    assert gathered.flags.c_contiguous
    assert not np.shares_memory(gathered, into)
    scatter(gather(before, entry), entry, into)
    assert into.tobytes() == before.tobytes()


@given(entry=tensor_maps())
@settings(max_examples=100, deadline=None)
def test_gather_equals_plain_enumeration(entry):
    array = np.arange(np.prod(entry.shape, dtype=int)).reshape(entry.shape)
    expected = array
    for axis, indices in enumerate(entry.axes):
        expected = expected if indices is None else np.take(expected, indices, axis)
    plain = TensorMap(entry.shape, "I64", entry.axes)
    assert np.array_equal(gather(array, plain), expected)


@given(maps=st.lists(tensor_maps(), max_size=5))
@settings(max_examples=50, deadline=None)
def test_a_map_survives_the_file_and_equal_maps_give_equal_bytes(tmp_path_factory, maps):
    folder = tmp_path_factory.mktemp("maps")
    tensors = {f"t{number}": entry for number, entry in enumerate(maps)}
    write_index_map(folder / "a", IndexMap(DIGEST, tensors), PROVENANCE)
    write_index_map(folder / "b", IndexMap(DIGEST, dict(reversed(tensors.items()))), PROVENANCE)
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    read = read_index_map(folder / "a")
    assert read.checkpoint == DIGEST
    assert read.tensors.keys() == tensors.keys()
    for name, entry in tensors.items():
        assert (read.tensors[name].shape, read.tensors[name].dtype) == (entry.shape, entry.dtype)
        for ours, theirs in zip(read.tensors[name].axes, entry.axes, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or np.array_equal(ours, theirs)


def test_each_distinct_array_is_stored_once(tmp_path):
    kept = np.array([0, 2], np.int32)
    entry = TensorMap((4, 4), "F32", (kept, kept.copy()))
    write_index_map(tmp_path / "x", IndexMap(DIGEST, {"a": entry, "b": entry}), PROVENANCE)
    with open_safetensors(tmp_path / "x") as file:
        assert list(file.tensors) == ["index.0"]


@st.composite
def compensated_maps(draw, dtypes=("F64", "F32", "F16", "BF16")):
    """Two to four axes; factors, some of them 1, along one or two of them."""
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=2, max_size=4)))
    axes = []
    for length in shape:
        kept = draw(st.none() | st.sets(st.integers(0, length - 1), max_size=length) if length else st.none())
        axes.append(None if kept is None else np.array(sorted(kept), np.int32))
    plain = TensorMap(shape, draw(st.sampled_from(dtypes)), tuple(axes))
    gate = st.just(1.0) | st.floats(0.25, 4, width=32)
    compensated = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1, max_size=2))
    factors = [
        np.array(draw(st.lists(gate, min_size=length, max_size=length)), np.float32) if axis in compensated else None
        for axis, length in enumerate(plain.submodel_shape)
    ]
    return TensorMap(shape, plain.dtype, plain.axes, tuple(factors))


def moderate_bits(entry: TensorMap, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random bits, of which those that a product with factors up to 16 would overflow, or that are NaN, are zeros or
    the smallest number of the dtype."""
    array = random_bits(entry, shape, seed)
    with np.errstate(invalid="ignore"):  # signalling NaN
        fits = np.abs(array.astype(np.float64)) < float(ml_dtypes.finfo(array.dtype).max) / 20
    small = ml_dtypes.finfo(array.dtype).smallest_subnormal * (np.arange(array.size).reshape(shape) % 3 - 1)
    return np.where(fits, array, small.astype(array.dtype))


def product_at(entry: TensorMap, place: tuple[int, ...]) -> float:
    along = [float(f[index]) for f, index in zip(entry.factors, place, strict=True) if f is not None]
    return float(np.prod(along))


@given(entry=compensated_maps(), seed=st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_scattering_an_untouched_compensated_submodel_gives_the_checkpoint_bit_for_bit(entry, seed):
    before = moderate_bits(entry, entry.shape, seed)
    small = gather(before, entry)
    assert (small.shape, small.dtype) == (entry.submodel_shape, before.dtype)
    assert not np.shares_memory(small, before)
    into = before.copy()
    scatter(small, entry, into)
    assert into.tobytes() == before.tobytes()


@given(entry=compensated_maps(), seed=st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_gather_multiplies_each_entry_by_the_factors_of_its_slices(entry, seed):
    before = moderate_bits(entry, entry.shape, seed)
    plain = gather(before, TensorMap(entry.shape, entry.dtype, entry.axes))
    small = gather(before, entry)
    wide = np.float64 if entry.dtype == "F64" else np.float32
    for place in np.ndindex(small.shape):
        expected = (wide(plain[place]) * wide(product_at(entry, place))).astype(before.dtype)
        assert small[place].tobytes() == expected.tobytes()


@given(entry=compensated_maps(), seed=st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_a_moved_entry_becomes_the_original_plus_its_move_over_the_factor_in_float64(entry, seed):
    before = moderate_bits(entry, entry.shape, seed)
    original = gather(before, TensorMap(entry.shape, entry.dtype, entry.axes))
    small = gather(before, entry)
    random = np.random.default_rng(seed)
    moves = random.random(small.shape) < 0.5
    trained = np.where(moves, random.normal(size=small.shape).astype(small.dtype), small)
    into = before.copy()
    scatter(trained, entry, into)
    restored = gather(into, TensorMap(entry.shape, entry.dtype, entry.axes))
    for place in np.ndindex(small.shape):
        factor = product_at(entry, place)
        if factor == 1:
            expected = trained[place]
        elif trained[place] == small[place]:
            expected = original[place]
        else:
            move = float(trained[place]) - float(small[place])
            expected = np.float64(float(original[place]) + move / factor).astype(before.dtype)
        assert restored[place].tobytes() == expected.tobytes()


@given(entry=compensated_maps(), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_factors_change_neither_which_entries_a_map_holds_nor_what_lies_outside(entry, seed):
    plain = without_factors(IndexMap(DIGEST, {"w": entry})).tensors["w"]
    assert plain.factors == ()
    assert plain.axes is entry.axes
    assert plain.submodel_shape == entry.submodel_shape
    before = moderate_bits(entry, entry.shape, seed)
    ours, theirs = before.copy(), before.copy()
    small = moderate_bits(entry, entry.submodel_shape, seed + 1)
    scatter(small, entry, ours)
    scatter(small, plain, theirs)
    held = np.zeros(entry.shape, bool)
    held[np.ix_(*(np.arange(n) if a is None else a for n, a in zip(entry.shape, entry.axes, strict=True)))] = True
    assert ours[~held].tobytes() == theirs[~held].tobytes() == before[~held].tobytes()


@pytest.mark.parametrize("dtype", sorted(FLOATS))
def test_where_the_factor_is_one_the_trained_number_keeps_all_its_digits(dtype):
    kind = DTYPES[dtype]
    original = np.array([[448.0, 448.0], [-0.0, 1.0]], kind)
    tiny = float(ml_dtypes.finfo(kind).smallest_subnormal)
    trained = np.array([[tiny, tiny], [0.0, -0.0]], kind)
    one = (np.ones(2, np.float32), None)
    assert unscaled(trained, original, one).tobytes() == trained.astype(np.float64).tobytes()
    opposite = (np.array([2.0, 0.25], np.float32), np.array([0.5, 4.0], np.float32))  # products 1, 8, 1/8, 1
    result = unscaled(trained, original, opposite)
    assert result[0, 0] == tiny
    assert np.signbit(result[1, 1])


def test_signed_zeros_and_numbers_that_vanish_under_a_factor_come_back():
    original = np.array([[-0.0, 0.0, 6e-8, -6e-8, 6e-5]], np.float16)
    factors = (None, np.full(5, 0.25, np.float32))
    small = scaled(original, factors)
    assert small[0, 2] == 0
    assert unscaled(small, original, factors).astype(np.float16).tobytes() == original.tobytes()
    moved = small.copy()
    moved[0, 2] = 0.5
    assert unscaled(moved, original, factors)[0, 2] == float(original[0, 2]) + 2.0


@pytest.mark.parametrize("dtype", sorted(FLOATS))
def test_what_the_dtype_cannot_hold_is_refused_without_a_warning_and_leaves_the_array_as_it_was(dtype):
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    enlarging = TensorMap((1, 2), dtype, (None, None), (None, np.array([4, 1], np.float32)))
    with pytest.raises(InputError, match=f"times its factors.* too large for {dtype}; keep"):
        gather(np.array([[largest, 1]], DTYPES[dtype]), enlarging)
    shrinking = TensorMap((1, 2), dtype, (None, None), (None, np.array([0.25, 1], np.float32)))
    into = np.array([[1, 1]], DTYPES[dtype])
    with pytest.raises(InputError, match=f"without its factors.* too large for {dtype}; keep"):
        scatter(np.array([[largest, 2]], DTYPES[dtype]), shrinking, into)
    assert into.tolist() == [[1, 1]]


@given(entries=st.lists(compensated_maps() | tensor_maps(), max_size=5))
@settings(max_examples=100, deadline=None)
def test_factors_survive_the_file_bit_for_bit(tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("maps")
    tensors = {f"t{number}": entry for number, entry in enumerate(entries)}
    write_index_map(folder / "a", IndexMap(DIGEST, tensors), PROVENANCE)
    write_index_map(folder / "b", IndexMap(DIGEST, dict(reversed(tensors.items()))), PROVENANCE)
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    read = read_index_map(folder / "a")
    for name, entry in tensors.items():
        assert [None if f is None else f.tobytes() for f in read.tensors[name].factors] == [
            None if f is None else f.tobytes() for f in entry.factors
        ]
        assert read.tensors[name].submodel_shape == entry.submodel_shape


def test_each_distinct_factor_array_is_stored_once_and_tensors_without_factors_do_not_mention_them(tmp_path):
    ones, halves = np.ones(4, np.float32), np.full(4, 0.5, np.float32)
    tensors = {
        "a": TensorMap((4, 4), "F32", (None, None), (halves, halves.copy())),
        "b": TensorMap((4, 4), "F32", (None, None), (None, halves.copy())),
        "c": TensorMap((4, 4), "F32", (None, None), (ones, None)),
        "d": TensorMap((4, 4), "F32", (None, None)),
    }
    write_index_map(tmp_path / "x", IndexMap(DIGEST, tensors), PROVENANCE)
    with open_safetensors(tmp_path / "x") as file:
        assert sorted(file.tensors) == ["factor.0", "factor.1"]
        record = json.loads(file.metadata["cahfp"])["tensors"]
    assert [entry.get("factors", "no") for entry in record.values()] == [[0, 0], [None, 0], [1, None], "no"]
    assert record["d"] == {"shape": [4, 4], "dtype": "F32", "axes": [None, None]}


def table(tmp_path, arrays, **changes):
    record = {
        "format": "cahfp.index_map/1",
        "checkpoint": DIGEST,
        "tensors": {"w": {"shape": [4, 3], "dtype": "F32", "axes": [0, None]}},
        "provenance": PROVENANCE.model_dump(mode="json"),
    }
    save_arrays(tmp_path / "map", arrays, {"cahfp": json.dumps(record | changes)})
    return tmp_path / "map"


def tensor(**changes):
    return {"tensors": {"w": {"shape": [4, 3], "dtype": "F32", "axes": [0, None]} | changes}}


GOOD = {"index.0": np.array([0, 3], np.int32)}
FAULTS = {
    "index out of range": ({"index.0": np.array([0, 4], np.int32)}, {}, "index 4.*0-3"),
    "negative index": ({"index.0": np.array([-1, 3], np.int32)}, {}, "index -1"),
    "repeated index": ({"index.0": np.array([1, 1], np.int32)}, {}, "repeated"),
    "unsorted": ({"index.0": np.array([3, 0], np.int32)}, {}, "increasing"),
    "wrong dtype": ({"index.0": np.array([0, 3], np.int64)}, {}, "I64"),
    "two axes": ({"index.0": np.array([[0, 3]], np.int32)}, {}, "one axis"),
    "dangling reference": (GOOD, tensor(axes=[1, None]), "index.1"),
    "negative reference": (GOOD, tensor(axes=[-1, None]), "axes"),
    "boolean reference": (GOOD, tensor(axes=[False, None]), "axes"),
    "text reference": (GOOD, tensor(axes=["0", None]), "axes"),
    "unused array": (GOOD, tensor(axes=[None, None]), "used by no tensor"),
    "foreign tensor": (GOOD | {"weights": np.zeros(3)}, {}, "weights"),
    "number with a leading zero": ({"index.00": GOOD["index.0"]}, {}, "index.00"),
    "too few axes": (GOOD, tensor(axes=[0]), "1 axes"),
    "negative shape": (GOOD, tensor(shape=[-4, 3]), "shape"),
    "boolean shape": (GOOD, tensor(shape=[True, 3]), "shape"),
    "unknown dtype": (GOOD, tensor(dtype="F33"), "F33"),
    "extra key": (GOOD, tensor(extra=1), "extra"),
    "another format": (GOOD, {"format": "cahfp.index_map/9"}, "format"),
    "no digest": (GOOD, {"checkpoint": "abc"}, "checkpoint"),
}


def scale(*factors, name="w", **changes):
    """A table with one tensor, its factors as given."""
    entry = {"shape": [4, 3], "dtype": "F32", "axes": [0, None], "factors": list(factors)} | changes
    return {"tensors": {name: entry}}


def along(*numbers, dtype=np.float32):
    return GOOD | {"factor.0": np.array(numbers, dtype)}


FINE = along(0.5, 4)
FAULTS |= {
    "dangling factor": (FINE, scale(1, None), "'w' refers to 'factor.1'"),
    "index in place of a factor": (GOOD | {"index.1": along(1, 2)["factor.0"]}, scale(0, None), "'index.1' is F32"),
    "negative factor reference": (FINE, scale(-1, None), "factors"),
    "boolean factor reference": (FINE, scale(False, None), "factors"),
    "broken factor reference": (FINE, scale(0.5, None), "factors"),
    "factors that are no list": (FINE, tensor(factors=0), "factors"),
    "no factors in the list": (GOOD, scale(), "factors"),
    "factors along no axis": (GOOD, scale(None, None), "along no axis"),
    "too few axes of factors": (FINE, scale(0), "factors for 1 axes"),
    "too many axes of factors": (FINE, scale(0, None, None), "factors for 3 axes"),
    "one array for axes of different lengths": (FINE, scale(0, 0), r"axis 1 has float32 factors of shape \(2,\)"),
    "factors for the length of the global axis": (along(1, 1, 1, 1), scale(0, None), r"not float32 \(2,\)"),
    "unused factors": (FINE, {}, "'factor.0' is used by no tensor"),
    "unused second factors": (FINE | {"factor.1": FINE["factor.0"]}, scale(0, None), "'factor.1' is used"),
    "factor with a leading zero": (GOOD | {"factor.00": FINE["factor.0"]}, scale(0, None), "factor.00"),
    "factors of float64": (along(0.5, 4, dtype=np.float64), scale(0, None), "'factor.0' is F64"),
    "factors of int32": (along(1, 4, dtype=np.int32), scale(0, None), "'factor.0' is I32"),
    "factors with two axes": (GOOD | {"factor.0": np.ones((2, 1), np.float32)}, scale(0, None), "one axis"),
    "factor without an axis": (GOOD | {"factor.0": np.ones((), np.float32)}, scale(0, None), "one axis"),
    "NaN as a factor": (along(1, np.nan), scale(0, None), "axis 0 has a factor"),
    "NaN first": (along(np.nan, 1), scale(0, None), "axis 0 has a factor"),
    "infinite factor": (along(1, np.inf), scale(0, None), "axis 0 has a factor"),
    "factor 0": (along(1, 0), scale(0, None), "axis 0 has a factor"),
    "factor -0": (along(1, -0.0), scale(0, None), "axis 0 has a factor"),
    "negative factor": (along(1, -1), scale(0, None), "axis 0 has a factor"),
    "huge factor": (along(1, 64.00001), scale(0, None), "not within 0.015625 and 64"),
    "tiny factor": (along(1, 0.0156249), scale(0, None), "not within 0.015625 and 64"),
    "factors that multiply to too much": (
        along(1, 16) | {"factor.1": np.full(3, 8, np.float32)},
        scale(0, 1),
        "axis 1 has a factor that, times",
    ),
    "factors that multiply to too little": (
        along(1, 0.1) | {"factor.1": np.full(3, 0.1, np.float32)},
        scale(0, 1),
        "axis 1 has a factor that, times",
    ),
    "factors of integers": (FINE, scale(0, None, dtype="I64"), "is I64: only weights"),
    "factors of booleans": (FINE, scale(0, None, dtype="BOOL"), "is BOOL: only weights"),
    "factors of a vector": (FINE, scale(0, shape=[4], axes=[0]), "vectors have none"),
    "factors of a scalar": (FINE | {"index.1": GOOD["index.0"]}, scale(0, shape=[], axes=[]), "vectors have none"),
    "factors of a running mean": (FINE, scale(0, None, name="bn.running_mean"), "running statistic"),
    "factors of a running variance": (FINE, scale(0, None, name="running_var"), "running statistic"),
    "factors of a buffer": (FINE, {"buffers": {"b": {"shape": [4], "axes": [0], "factors": [0]}}}, "factors"),
}


def test_factors_at_the_bounds_and_of_every_float_dtype_are_read(tmp_path):
    for dtype in FLOATS:
        for name in ("w", "running_mean.weight"):
            read = read_index_map(table(tmp_path, along(1 / 64, 64), **scale(0, None, name=name, dtype=dtype)))
            assert read.tensors[name].factors[0].tolist() == [1 / 64, 64]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_map_that_lies_is_refused(tmp_path, fault):
    arrays, changes, words = FAULTS[fault]
    path = table(tmp_path, arrays, **changes)
    with pytest.raises(InputError, match=words) as error:
        read_index_map(path)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).count(str(path)) == 1
    assert str(error.value).count("\n") <= 1


def test_check_against_names_the_tensor_that_does_not_fit(tmp_path):
    save_arrays(tmp_path / "g", {"w": np.zeros((4, 3), np.float32), "n": np.zeros((), np.int64)}, {})
    fits = TensorMap((4, 3), "F32", (None, None))
    factors = TensorMap((4, 3), "F32", (None, None), (None, np.ones(3, np.float32)))
    with open_safetensors(tmp_path / "g") as file:
        check_against(IndexMap(DIGEST, {"w": fits}), file)
        check_against(IndexMap(DIGEST, {"w": factors}), file)
        for tensors, words in [
            ({}, "lacks.*'w'"),
            ({"w": fits, "v": fits}, "lacks.*'v'"),
            ({"w": TensorMap((4, 4), "F32", (None, None))}, r"'w' is F32 \[4, 3\].*\[4, 4\]"),
            ({"w": TensorMap((4, 3), "F16", (None, None))}, "F16"),
        ]:
            with pytest.raises(InputError, match=words):
                check_against(IndexMap(DIGEST, tensors), file)


def test_arrays_that_do_not_fit_the_map_are_refused():
    entry = TensorMap((4,), "F32", (np.array([1], np.int32),))
    with pytest.raises(InputError, match="index map says"):
        gather(np.zeros(5, np.float32), entry)
    with pytest.raises(InputError, match="index map says"):
        scatter(np.zeros(1), entry, np.zeros(4, np.float32))


def test_a_file_larger_than_any_map_of_the_checkpoint_is_refused_before_it_is_decoded(tmp_path):
    save_arrays(tmp_path / "global", {"w": np.zeros((3, 5), np.float32)}, {})
    entry = TensorMap((3, 5), "F32", (np.arange(2, dtype=np.int32), np.arange(4, dtype=np.int32)))
    write_index_map(tmp_path / "map", IndexMap(DIGEST, {"w": entry}), PROVENANCE)
    with open_safetensors(tmp_path / "global") as checkpoint:
        assert read_index_map(tmp_path / "map", checkpoint).tensors["w"].submodel_shape == (2, 4)
        with (tmp_path / "map").open("ab") as file:
            file.write(b" " * most_bytes(checkpoint))
        with pytest.raises(InputError, match="a sound one has at most"):
            read_index_map(tmp_path / "map", checkpoint)
