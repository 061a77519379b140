"""Damage to one client's files: every byte region of a safetensors file, and every claim that the server checks.

A `Damage` is applied to client 1 of a fleet. `words` is what the refusal says; None means that the result must not
change by a bit, because nothing that it depends on was damaged.
"""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.formats.index_map import IndexMap, TensorMap
from cahfp_cli.formats.index_map_file import write_index_map
from tests.support.clients_on_disk import PROVENANCE, Fleet, save_client

SUBMODEL, MAP, REPORT = "submodel.safetensors", "index_map.safetensors", "report.json"


@dataclass(frozen=True)
class Damage:
    file: str
    words: str | None
    apply: Callable[[Fleet], object]


def path_of(it: Fleet, file: str) -> Path:
    return it.folders[1] / file


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data, read without our reader."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def join(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def length(file: str, change: Callable[[int], int], words: str) -> Damage:
    def apply(it: Fleet) -> None:
        raw = path_of(it, file).read_bytes()
        new = change(int.from_bytes(raw[:8], "little"))
        path_of(it, file).write_bytes(new.to_bytes(8, "little") + raw[8:])

    return Damage(file, words, apply)


def text(file: str, change: Callable[[bytes], bytes], words: str | None) -> Damage:
    """Another header text, with its right length."""

    def apply(it: Fleet) -> None:
        raw = path_of(it, file).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        new = change(raw[8:end])
        assert new != raw[8:end]
        join(path_of(it, file), new, raw[end:])

    return Damage(file, words, apply)


def header(file: str, change: Callable[[dict[str, Any]], object], words: str | None) -> Damage:
    def apply(it: Fleet) -> None:
        entries, data = split(path_of(it, file))
        change(entries)
        join(path_of(it, file), entries, data)

    return Damage(file, words, apply)


def first(entries: dict[str, Any]) -> dict[str, Any]:
    """The entry whose elements come first: the counter of batches in a submodel, some array in a map."""
    named = {name: entry for name, entry in entries.items() if name != "__metadata__"}
    return min(named.values(), key=lambda entry: entry["data_offsets"])


def field(file: str, key: str, value: object, words: str | None) -> Damage:
    return header(file, lambda entries: first(entries).update({key: value}), words)


def data(file: str, change: Callable[[bytes], bytes], words: str) -> Damage:
    def apply(it: Fleet) -> None:
        path_of(it, file).write_bytes(change(path_of(it, file).read_bytes()))

    return Damage(file, words, apply)


def record(file: str, change: Callable[[dict[str, Any]], object], words: str | None) -> Damage:
    """Another `cahfp` record in the metadata."""

    def edit(entries: dict[str, Any]) -> None:
        fields = json.loads(entries["__metadata__"]["cahfp"])
        change(fields)
        entries["__metadata__"]["cahfp"] = json.dumps(fields)

    return header(file, edit, words)


def instead(file: str, make: Callable[[Path], object], words: str) -> Damage:
    def apply(it: Fleet) -> None:
        path_of(it, file).unlink()
        make(path_of(it, file))

    return Damage(file, words, apply)


def tensors(change: Callable[[dict[str, np.ndarray]], object], words: str | None) -> Damage:
    """A well-formed submodel of other tensors."""

    def apply(it: Fleet) -> None:
        arrays = {name: tensor.copy() for name, tensor in it.submodels[1].items()}
        change(arrays)
        save_client(it.folders[1], arrays, it.maps[1], it.examples[1])

    return Damage(SUBMODEL, words, apply)


def arrays(change: Callable[[dict[str, np.ndarray]], object], words: str) -> Damage:
    """A well-formed map file with other arrays under the same table."""

    def apply(it: Fleet) -> None:
        with open_safetensors(path_of(it, MAP)) as file:
            held, metadata = {name: file.read(name) for name in file.tensors}, file.metadata
        change(held)
        save_arrays(path_of(it, MAP), held, metadata)

    return Damage(MAP, words, apply)


def reported(content: str, words: str) -> Damage:
    """No num_examples in the submodel, and this as report.json."""

    def apply(it: Fleet) -> None:
        save_client(it.folders[1], it.submodels[1], it.maps[1], None)
        path_of(it, REPORT).write_text(content)

    return Damage(REPORT, words, apply)


def put(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(held: dict[str, np.ndarray]) -> None:
        held[name].reshape(-1)[-1] = value

    return change


def replace(name: str, new: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda held: held.update({name: new(held[name])})


def rename(held: dict[str, Any], old: str, new: str) -> None:
    held[new] = held.pop(old)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)


def named(key: str, **changes: object) -> Callable[[dict[str, Any]], object]:
    """In a map's table, other fields of the tensor `key`."""
    return lambda fields: fields["tensors"][key].update(changes)


def statistic_with_factors(fields: dict[str, Any]) -> None:
    fields["tensors"]["bn1.running_var"]["factors"] = [0]


def beyond_the_arrays(fields: dict[str, Any]) -> None:
    fields["tensors"]["bn1.running_mean"]["axes"] = [9]


def mean_of_other_channels(it: Fleet) -> None:
    """As many channels, so that all shapes fit, but not those of the variance."""
    entry = it.maps[1].tensors["bn1.running_mean"]
    chosen = np.arange(entry.submodel_shape[0], dtype=np.int32)
    if entry.axes[0] is not None and np.array_equal(chosen, entry.axes[0]):
        chosen = chosen + 1
    mapping = {**it.maps[1].tensors, "bn1.running_mean": TensorMap(entry.shape, entry.dtype, (chosen,))}
    write_index_map(path_of(it, MAP), IndexMap(it.maps[1].checkpoint, mapping), PROVENANCE)


BOMB = b"[" + b"[]," * 2_000_000 + b"[]]"
DEEP = b"[" * 100_000 + b"]" * 100_000


def many_lists(file: str, count: int) -> Damage:
    """JSON takes many times its size once it is parsed, empty objects the most; `count` is in bytes."""
    return text(file, lambda t: b'{"x":[' + b"{}," * (count // 3) + b"0]," + t[1:], "exactly the keys")


def both(file: str) -> dict[str, Damage]:
    """What every safetensors file must withstand, whatever it is for."""
    return {
        "length 0": length(file, lambda _: 0, "damaged"),
        "length 1": length(file, lambda _: 1, "damaged"),
        "length one less": length(file, lambda n: n - 1, "damaged"),
        "length one more": length(file, lambda n: n + 1, "damaged|cut short"),
        "length beyond the file": length(file, lambda n: n + 10_000_000, "cut short|claims"),
        "length 2^63": length(file, lambda _: 2**63, "not a safetensors"),
        "length 2^64-1": length(file, lambda _: 2**64 - 1, "not a safetensors"),
        "header not UTF-8": text(file, lambda t: t[:-1] + b"\xff", "UTF-8"),
        "header not JSON": text(file, lambda t: t.replace(b":", b";", 1), "not JSON"),
        "header duplicate key": text(file, lambda t: b'{"__metadata__":{},' + t[1:], "given twice"),
        "header nested deeply": text(file, lambda t: b'{"x":' + DEEP + b"," + t[1:], "nested|at most"),
        "header nested a little too deep": text(
            file, lambda t: b'{"x":' + b"[" * 70 + b"]" * 70 + b"," + t[1:], "nested|exactly the keys"
        ),
        "header of millions of lists": text(file, lambda t: b'{"x":' + BOMB + b"," + t[1:], "bytes"),
        "header of many lists in an allowed size": many_lists(file, 120_000),
        "header with NaN": text(file, lambda t: b'{"x":NaN,' + t[1:], "NaN"),
        "header with an infinite number": text(file, lambda t: b'{"x":1e999,' + t[1:], "too large"),
        "header with 5,000 digits": text(file, lambda t: b'{"x":' + b"9" * 5000 + b"," + t[1:], "damaged"),
        "header an array": text(file, lambda t: b"[" + t + b"]", "not a safetensors"),
        "header half a surrogate pair": text(file, lambda t: b'{"\\ud800":1,' + t[1:], "surrogate"),
        "header trailing garbage": text(file, lambda t: t.rstrip() + b"x", "not JSON"),
        "header trailing spaces": text(file, lambda t: t + b" " * 64, None),
        "dtype unknown": field(file, "dtype", "F33", "has dtype"),
        "dtype a list": field(file, "dtype", ["F32"], "has dtype"),
        "shape negative": field(file, "shape", [-1, -2], "shape"),
        "shape boolean": field(file, "shape", [True], "shape"),
        "shape a float": field(file, "shape", [2.0], "shape"),
        "shape huge": field(file, "shape", [2**40], "needs"),
        "shape whose product overflows": field(file, "shape", [2**32, 2**33], "larger than any machine"),
        "shape of thousands of digits": field(file, "shape", [10**4000], "shape"),
        "shape zero times huge": field(file, "shape", [0, 2**61, 2**61], "larger than any machine"),
        "shape of 1,000 axes": field(file, "shape", [1] * 1000, "at most"),
        "offsets reversed": header(file, lambda h: first(h)["data_offsets"].reverse(), "bytes"),
        "offsets beyond the end": field(file, "data_offsets", [0, 2**50], "cut short"),
        "offsets of thousands of digits": field(file, "data_offsets", [0, 10**4000], "data_offsets"),
        "offsets three": field(file, "data_offsets", [0, 8, 8], "data_offsets"),
        "offsets not of the shape": field(file, "data_offsets", [0, 3], "needs"),
        "tensors overlap": header(file, lambda h: h.update({"twin": dict(first(h))}), "overlaps"),
        "tensors leave a gap": header(file, lambda h: h.pop(next(n for n in h if h[n] is first(h))), "gap"),
        "extra key": field(file, "more", 1, "exactly the keys"),
        "missing key": header(file, lambda h: first(h).pop("dtype"), "exactly the keys"),
        "metadata not strings": header(file, lambda h: h["__metadata__"].update(n=3), "strings"),
        "metadata missing": header(file, lambda h: h.pop("__metadata__"), "metadata"),
        "record not JSON": header(file, lambda h: h["__metadata__"].update(cahfp="{"), "damaged"),
        "record nested deeply": header(file, lambda h: h["__metadata__"].update(cahfp=DEEP.decode()), "nested|at most"),
        "record unknown key": record(file, lambda r: r.update(extra=1), "extra"),
        "record of another format": record(file, lambda r: r.update(format="cahfp.other/1"), "format"),
        "record digest of another checkpoint": record(file, lambda r: r.update(checkpoint="0" * 64), "another"),
        "record digest not hexadecimal": record(file, lambda r: r.update(checkpoint="z" * 64), "checkpoint"),
        "record other provenance": record(file, lambda r: r["provenance"].update(command="x"), None),
        "thousands of tensors": header(
            file,
            lambda h: h.update({f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(3000)}),
            "bytes|beyond its index map|holds a tensor",
        ),
        "cut by a byte": data(file, lambda raw: raw[:-1], "cut short|bytes"),
        "one byte too many": data(file, lambda raw: raw + b"\0", "file has|bytes"),
        "empty file": data(file, lambda _: b"", "empty|bytes"),
        "seven bytes": data(file, lambda raw: raw[:7], "empty|bytes"),
        "a pickle": data(file, lambda _: pickle.dumps({"w": [1.0] * 99}), "pickle"),
        "a zip archive": instead(file, zipped, "zip archive"),
        "a folder": instead(file, Path.mkdir, "a folder"),
        "a FIFO": instead(file, os.mkfifo, "not a regular file"),
        "a dangling symlink": instead(file, lambda path: path.symlink_to("nowhere"), "no such file"),
        "a device": instead(file, lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    }


SUBMODELS = {
    "tensor missing": tensors(lambda t: t.pop("bn1.weight"), "lacks 'bn1.weight'"),
    "tensor extra": tensors(lambda t: t.update(extra=np.ones(2, np.float32)), "'extra'"),
    "tensor renamed": tensors(lambda t: rename(t, "head.bias", "head.bais"), "head.bias"),
    "tensor of another shape": tensors(replace("head.bias", lambda a: a[:3]), "'head.bias' is F32"),
    "tensor transposed": tensors(replace("head.bias", lambda a: a[None]), "'head.bias' is F32"),
    "tensor of another dtype": tensors(
        replace("head.bias", lambda a: a.astype(np.float64)), "'head.bias' is F64|bytes"
    ),
    "NaN": tensors(put("conv2.weight", np.nan), "NaN"),
    "inf": tensors(put("head.weight", -np.inf), "NaN or inf"),
    "variance negative": tensors(put("bn2.running_var", -1e-9), "negative variance"),
    "num_examples 0": record(SUBMODEL, lambda r: r.update(num_examples=0), "num_examples"),
    "num_examples negative": record(SUBMODEL, lambda r: r.update(num_examples=-9), "num_examples"),
    "num_examples huge": record(SUBMODEL, lambda r: r.update(num_examples=10**300), "num_examples"),
    "num_examples a boolean": record(SUBMODEL, lambda r: r.update(num_examples=True), "num_examples"),
    "num_examples NaN": record(SUBMODEL, lambda r: r.update(num_examples=float("nan")), "NaN"),
    "report negative count": reported('{"num_examples": -3}', "positive integer"),
    "report count 0": reported('{"num_examples": 0}', "positive integer"),
    "report count huge": reported('{"num_examples": 1' + "0" * 300 + "}", "num_examples"),
    "report count NaN": reported('{"num_examples": NaN}', "NaN"),
    "report no JSON": reported("{", "not JSON"),
    "report nested deeply": reported(DEEP.decode(), "nested"),
}

MAPS = {
    "index negative": arrays(put("index.0", -1), "index|repeated"),
    "index out of range": arrays(put("index.0", 10**6), "index 1000000"),
    "indices repeated": arrays(replace("index.0", lambda a: np.repeat(a[:1], len(a))), "repeated"),
    "indices unsorted": arrays(replace("index.0", lambda a: a[::-1].copy()), "increasing"),
    "indices of another dtype": arrays(replace("index.0", lambda a: a.astype(np.int64)), "I64"),
    "indices with two axes": arrays(replace("index.0", lambda a: a[None]), "one axis"),
    "index array unused": arrays(
        lambda held: held.update({"index.7": held["index.0"]}), "not in|index.7|index map holds"
    ),
    "index array missing": arrays(lambda held: rename(held, "index.0", "index.1"), "refers to|index map"),
    "array of another name": arrays(lambda held: rename(held, "index.0", "weights"), "holds a tensor"),
    "factor 0": arrays(put("factor.0", 0.0), "factor"),
    "factor out of range": arrays(put("factor.0", 1e6), "factor"),
    "factor NaN": arrays(put("factor.0", np.nan), "factor"),
    "factors too few": arrays(replace("factor.0", lambda a: a[:-1]), "factors of shape"),
    "factors of another dtype": arrays(replace("factor.0", lambda a: a.astype(np.float64)), "F64"),
    "factors of a running statistic": record(MAP, statistic_with_factors, "running statistic"),
    "reference beyond the arrays": record(MAP, beyond_the_arrays, "refers to"),
    "tensor of another global shape": record(MAP, named("head.bias", shape=[5]), "'head.bias'"),
    "tensor of another global dtype": record(MAP, named("head.bias", dtype="F16"), "'head.bias'"),
    "tensor of an unknown dtype": record(MAP, named("head.bias", dtype="F4"), "dtype"),
    "shape beyond any machine": record(MAP, named("head.bias", shape=[10**4000]), "shape"),
    "axes too few": record(MAP, named("conv1.weight", axes=[None]), "axes"),
    "tensor left out": record(MAP, lambda r: r["tensors"].pop("head.bias"), "'head.bias'"),
    "tensor that the global lacks": record(MAP, lambda r: r["tensors"].update(more=r["tensors"]["scale"]), "'more'"),
    "huge table": record(
        MAP, lambda r: r["tensors"].update({f"t{n}": r["tensors"]["scale"] for n in range(100_000)}), "bytes"
    ),
    "mean of other channels than variance": Damage("", "other channels", mean_of_other_channels),
}

DAMAGES: dict[str, Damage] = (
    {f"submodel: {name}": damage for name, damage in (both(SUBMODEL) | SUBMODELS).items()}
    | {f"map: {name}": damage for name, damage in (both(MAP) | MAPS).items()}
)  # fmt: skip
