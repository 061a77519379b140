"""Gather and scatter are exact inverses, and a map file that is damaged or lies is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cahfp_cli.checkpoint.dtypes import DTYPES
from cahfp_cli.checkpoint.metadata import Provenance
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError
from cahfp_cli.pruning.index_map import (
    IndexMap,
    TensorMap,
    check_against,
    gather,
    read_index_map,
    scatter,
    write_index_map,
)

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


@pytest.mark.parametrize("fault", FAULTS)
def test_a_map_that_lies_is_refused(tmp_path, fault):
    arrays, changes, words = FAULTS[fault]
    path = table(tmp_path, arrays, **changes)
    with pytest.raises(InputError, match=words) as error:
        read_index_map(path)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).count("\n") <= 1


def test_check_against_names_the_tensor_that_does_not_fit(tmp_path):
    save_arrays(tmp_path / "g", {"w": np.zeros((4, 3), np.float32), "n": np.zeros((), np.int64)}, {})
    fits = TensorMap((4, 3), "F32", (None, None))
    with open_safetensors(tmp_path / "g") as file:
        check_against(IndexMap(DIGEST, {"w": fits}), file)
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
