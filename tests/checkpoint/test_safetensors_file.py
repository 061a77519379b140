"""Our reader and writer agree with the safetensors library, and no damaged file gets past the reader."""

import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from cahfp_cli.checkpoint.digest import arrays_digest, content_digest
from cahfp_cli.checkpoint.dtypes import BITS, DTYPES, PACKED
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import TensorSpec, save_arrays, write_safetensors
from cahfp_cli.errors import InputError

pytestmark = pytest.mark.quick

ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([True, False, True]),
    "scalar": np.asarray(7, np.int64),
    "empty": np.zeros((0, 4), np.float16),
    "ü.weight": np.arange(5, dtype=np.float16),
    "wide": np.arange(3, dtype=np.float64),
}


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def test_the_safetensors_library_reads_what_we_write(tmp_path):
    path = tmp_path / "x.safetensors"
    save_arrays(path, ARRAYS, {"format": "pt", "k": "v"})
    loaded = load_file(path)
    assert loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        assert np.array_equal(loaded[name], array)
        assert loaded[name].shape == array.shape
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt", "k": "v"}


def test_we_read_what_the_safetensors_library_writes(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors", {"k": "v"})
    with open_safetensors(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"k": "v"}
        for name, array in ARRAYS.items():
            read = file.read(name)
            assert read.dtype == array.dtype
            assert read.shape == array.shape
            assert read.tobytes() == array.tobytes()
            assert read.flags.writeable
            assert read.flags.owndata or read.base is None


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_survives_a_round_trip_and_starts_aligned(tmp_path, code):
    array = np.array([[0, 1], [1, 0], [1, 1]]).astype(DTYPES[code])
    save_arrays(tmp_path / "x", {"x": array, "odd": np.ones(3, np.uint8)}, {})
    with open_safetensors(tmp_path / "x") as file:
        assert file.tensors["x"].dtype == code
        assert file.tensors["x"].start % DTYPES[code].itemsize == 0
        assert file.read("x").dtype == array.dtype
        assert file.read("x").tobytes() == array.tobytes()
        assert file.read_rows("x", 1, 3).tobytes() == array[1:].tobytes()
    with safe_open(tmp_path / "x", "np") as library:
        assert set(library.keys()) == {"x", "odd"}


@given(
    arrays=st.dictionaries(
        st.text("abc.é", min_size=1, max_size=5),
        hnp.arrays(
            st.sampled_from(list(DTYPES.values())),
            hnp.array_shapes(min_dims=0, max_dims=3, max_side=4),
            fill=st.just(0),
            elements=st.sampled_from([0, 1]),
        ),
        max_size=4,
    )
)
@settings(max_examples=50, deadline=None)
def test_round_trip_and_digest_do_not_depend_on_order_metadata_or_container(tmp_path_factory, arrays):
    folder = tmp_path_factory.mktemp("x")
    save_arrays(folder / "one", arrays, {})
    save_arrays(folder / "two", dict(reversed(arrays.items())), {"k": "v"})
    assert content_digest(folder / "one") == content_digest(folder / "two") == arrays_digest(arrays)
    save_arrays(folder / "three", dict(reversed(arrays.items())), {})
    assert (folder / "one").read_bytes() == (folder / "three").read_bytes()


def test_digest_depends_on_names_dtypes_shapes_and_bits():
    one = {"a": np.zeros((2, 3), np.float32)}
    others = [
        {"b": one["a"]},
        {"a": one["a"].reshape(3, 2)},
        {"a": one["a"].view(np.int32)},
        {"a": -one["a"]},
        {**one, "b": np.zeros((0,), np.float32)},
    ]
    assert len({arrays_digest(arrays) for arrays in [one, *others]}) == len(others) + 1
    assert (
        arrays_digest({"a": one["a"].astype(">f4")})
        == arrays_digest({"a": np.asfortranarray(one["a"])})
        == arrays_digest(one)
    )


@pytest.mark.parametrize("code", PACKED)
@pytest.mark.parametrize("shape", [(8,), (3, 8), (4, 1, 3), (12, 5)])
def test_packed_elements_survive_a_round_trip_whole_in_rows_and_in_blocks(tmp_path, code, shape, monkeypatch):
    values = np.random.default_rng(0).integers(0, 2 ** BITS[code], shape, np.uint8).view(PACKED[code])
    save_arrays(tmp_path / "x", {"x": values, "after": np.ones(3, np.float32)}, {})
    with safe_open(tmp_path / "x", "np") as library:
        assert set(library.keys()) == {"x", "after"}
    with open_safetensors(tmp_path / "x") as file:
        assert file.tensors["x"].nbytes == values.size * BITS[code] // 8
        assert file.read("x").tobytes() == values.tobytes()
        for first in range(len(values)):
            assert file.read_rows("x", first, len(values)).tobytes() == values[first:].tobytes()
    monkeypatch.setattr("cahfp_cli.checkpoint.digest.BLOCK_BYTES", 1)
    assert content_digest(tmp_path / "x") == arrays_digest({"x": values, "after": np.ones(3, np.float32)})


def test_types_of_the_library_that_numpy_lacks_are_read_as_it_wrote_them(tmp_path):
    scales = torch.arange(1, 5, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    nibbles = torch.tensor([[0x21, 0x43], [0x65, 0x87]], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_torch({"f8": scales, "f4": nibbles, "c": torch.tensor([1 + 2j])}, tmp_path / "x")
    with open_safetensors(tmp_path / "x") as file:
        assert {name: (info.dtype, info.shape) for name, info in file.tensors.items()} == {
            "f8": ("F8_E8M0", (4,)),
            "f4": ("F4", (2, 4)),
            "c": ("C64", (1,)),
        }
        assert file.read("f8").astype(np.float64).tolist() == [2.0**k for k in range(-126, -122)]
        assert file.read("f4").view(np.uint8).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
        assert file.read("c").tolist() == [1 + 2j]


@pytest.mark.parametrize(
    "name", ["block\u00a01.weight", "no\u00adbreak", "\u200bzero", "\ue000", "a\u202eb", "层.权重"]
)
def test_any_text_without_control_characters_is_a_name(tmp_path, name):
    save_file({name: np.zeros(2, np.float32)}, tmp_path / "x")
    save_arrays(tmp_path / "y", {name: np.zeros(2, np.float32)}, {})
    with open_safetensors(tmp_path / "x") as file:
        assert list(file.tensors) == [name]
    assert content_digest(tmp_path / "x") == content_digest(tmp_path / "y")
    with open_safetensors(tmp_path / "y") as file, pytest.raises(InputError) as error:
        file.read(name + "?")
    assert str(error.value).isprintable()


def test_a_resaved_file_is_the_same_checkpoint(tmp_path):
    save_file(ARRAYS, tmp_path / "library")
    save_arrays(tmp_path / "ours", ARRAYS, {"x": "y"})
    assert content_digest(tmp_path / "library") == content_digest(tmp_path / "ours")


def test_rows_of_a_scalar_and_rows_that_are_not_there(tmp_path):
    save_arrays(tmp_path / "x", ARRAYS, {})
    with open_safetensors(tmp_path / "x") as file:
        assert file.read_rows("scalar", 0, 1).shape == ()
        assert file.read_rows("empty", 0, 0).shape == (0, 4)
        with pytest.raises(IndexError):
            file.read_rows("b", 0, 3)
        with pytest.raises(InputError, match="no tensor 'x'"):
            file.read("x")


def test_a_closed_file_reopens_itself_and_notices_that_it_was_replaced(tmp_path):
    path = tmp_path / "x"
    save_arrays(path, ARRAYS, {})
    with open_safetensors(path) as file:
        pass
    assert np.array_equal(file.read("b"), ARRAYS["b"])
    save_arrays(tmp_path / "y", ARRAYS, {})
    (tmp_path / "y").replace(path)
    with pytest.raises(InputError, match="changed"):
        file.read("b")


def test_a_file_that_shrinks_while_open_is_an_error(tmp_path):
    path = tmp_path / "x"
    save_arrays(path, ARRAYS, {})
    with open_safetensors(path) as file:
        os.truncate(path, file.tensors["b"].end - 1)
        with pytest.raises(InputError, match="shorter"):
            file.read("b")


def test_writer_refuses_blocks_that_do_not_fit(tmp_path):
    spec = TensorSpec("x", "F32", (2, 2))
    for blocks in ([np.zeros(4, np.float64)], [np.zeros((1, 2), np.float32)], [np.zeros((3, 2), np.float32)]):
        with pytest.raises(ValueError, match="x: "):
            write_safetensors(tmp_path / "x", [spec], lambda _, blocks=blocks: iter(blocks), {})
    with pytest.raises(ValueError, match="twice"):
        write_safetensors(tmp_path / "x", [spec, spec], lambda _: iter([np.zeros((2, 2), np.float32)]), {})
    with pytest.raises(ValueError, match="cannot be stored"):
        save_arrays(tmp_path / "x", {"x": np.zeros(2, complex)}, {})


DAMAGED = {
    "empty": b"",
    "eight bytes": b"\x02\0\0\0\0\0\0\0",
    "huge header length": b"\xff" * 8 + b"{}",
    "header length beyond the file": (1000).to_bytes(8, "little") + b"{}",
    "header above the bound": (200_000_000).to_bytes(8, "little") + b"{}",
    "not JSON": raw(b"{nope}"),
    "a list": raw([]),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "text after the JSON": raw(b"{} x"),
    "lone surrogate": raw(b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
    "NaN": raw(b'{"x": NaN}'),
    "duplicate tensor": raw(b'{"x": %s, "x": %s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "duplicate field": raw(b'{"x": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
    "deep nesting": raw(b'{"x":' + b"[" * 200 + b"]" * 200 + b"}"),
    "very deep nesting": raw(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "long integer": raw(b'{"x": ' + b"9" * 10_000 + b"}"),
    "entry is no object": raw({"x": 1}),
    "missing field": raw({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "extra field": raw({"x": entry(extra=1)}, bytes(8)),
    "packed elements that end inside a byte": raw({"x": entry(dtype="F4", shape=[3], data_offsets=[0, 2])}, bytes(2)),
    "unknown dtype": raw({"x": entry(dtype="F31")}, bytes(8)),
    "dtype is no string": raw({"x": entry(dtype=["F32"])}, bytes(8)),
    "negative shape": raw({"x": entry(shape=[-2, -1])}, bytes(8)),
    "boolean shape": raw({"x": entry(shape=[True, 2])}, bytes(8)),
    "float shape": raw({"x": entry(shape=[2.0])}, bytes(8)),
    "shape is no list": raw({"x": entry(shape=2)}, bytes(8)),
    "too many axes": raw({"x": entry(shape=[1] * 33 + [2])}, bytes(8)),
    "shape overflows 64 bits": raw({"x": entry(shape=[2**63, 2**63])}, bytes(8)),
    "shape overflows to the right size": raw({"x": entry(shape=[2**63 + 1, 2])}, bytes(8)),
    "shape overflows beside a zero": raw({"x": entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0])}),
    "shape disagrees with offsets": raw({"x": entry(shape=[3])}, bytes(8)),
    "negative offset": raw({"x": entry(data_offsets=[-8, 0])}, bytes(8)),
    "boolean offset": raw({"x": entry(dtype="U8", shape=[1], data_offsets=[False, True])}, bytes(1)),
    "three offsets": raw({"x": entry(data_offsets=[0, 8, 8])}, bytes(8)),
    "end before start": raw({"x": entry(data_offsets=[8, 0])}, bytes(8)),
    "offset beyond the file": raw({"x": entry(data_offsets=[8, 16])}, bytes(8)),
    "overlap": raw({"x": entry(), "y": entry(data_offsets=[4, 12])}, bytes(12)),
    "same bytes twice": raw({"x": entry(), "y": entry()}, bytes(8)),
    "gap at the start": raw({"x": entry(data_offsets=[4, 12])}, bytes(12)),
    "gap between": raw({"x": entry(), "y": entry(data_offsets=[12, 20])}, bytes(20)),
    "trailing bytes": raw({"x": entry()}, bytes(9)),
    "metadata is no object": raw({"__metadata__": [], "x": entry()}, bytes(8)),
    "metadata value is no string": raw({"__metadata__": {"a": 1}, "x": entry()}, bytes(8)),
    "empty name": raw({"": entry()}, bytes(8)),
    "control characters in a name": raw({"a\u001b[2J": entry()}, bytes(8)),
    "endless name": raw({"a" * 5000: entry()}, bytes(8)),
    "pickle, protocol 2": pickle.dumps({"w": [1.0] * 10}, protocol=2),
    "pickle, protocol 5": pickle.dumps({"w": [1.0] * 10}, protocol=5),
    "text": b"hello, these are not weights",
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_damaged_file_is_refused_by_name(tmp_path, fault):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(DAMAGED[fault])
    with pytest.raises(InputError) as error:
        open_safetensors(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) < 1000
    assert str(error.value).count("\n") <= 1
    assert str(error.value).replace("\n", "").isprintable()


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9, 0.99])
def test_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "cut.safetensors"
    save_arrays(path, ARRAYS, {})
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(InputError, match="cut"):
        open_safetensors(path)


def test_pickles_are_named_as_such(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("data.pkl", b"")
    (tmp_path / "y.pt").write_bytes(pickle.dumps({"weight": [1.0, 2.0]}))
    for name in ("x.pt", "y.pt"):
        with pytest.raises(InputError, match="pickles are not read here"):
            open_safetensors(tmp_path / name)


def test_a_header_that_starts_like_a_pickle_is_read(tmp_path):
    text = json.dumps({"x": entry()}).encode().ljust(0x0280)
    (tmp_path / "x").write_bytes(raw(text, bytes(8)))
    assert (tmp_path / "x").read_bytes()[:2] == b"\x80\x02"
    with open_safetensors(tmp_path / "x") as file:
        assert file.read("x").tolist() == [0, 0]


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing", tmp_path / "missing" / "x"):
        with pytest.raises(InputError, match=str(path)):
            open_safetensors(path)


def test_booleans_other_than_0_and_1_are_refused(tmp_path):
    (tmp_path / "x").write_bytes(raw({"x": entry(dtype="BOOL", shape=[2], data_offsets=[0, 2])}, b"\x01\x02"))
    with open_safetensors(tmp_path / "x") as file, pytest.raises(InputError, match="neither 0 nor 1"):
        file.read("x")


@given(data=st.binary(max_size=300), place=st.floats(0, 1), position=st.integers(0, 400))
@settings(max_examples=150, deadline=None)
def test_no_damage_escapes_as_another_exception(tmp_path_factory, data, place, position):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    save_arrays(path, {"x": np.ones(3, ml_dtypes.bfloat16), "y": np.ones((2, 2), np.float32)}, {"cahfp": "{}"})
    good = path.read_bytes()
    path.write_bytes(good[:position] + data + good[position + int(len(data) * place) :])
    try:
        with open_safetensors(path) as file:
            for name in file.tensors:
                file.read(name)
    except InputError:
        pass
