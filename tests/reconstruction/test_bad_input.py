"""Every damaged or unfitting input is an InputError that names the file, and leaves no output."""

import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest

from cahfp_cli.checkpoint.digest import arrays_digest
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError
from cahfp_cli.formats.index_map import IndexMap, TensorMap
from cahfp_cli.formats.index_map_file import write_index_map
from cahfp_cli.reconstruction.merge import reconstruct
from tests.support.clients_on_disk import PROVENANCE, Fleet, fleet, load, save_client, save_global


def submodel(it: Fleet) -> Path:
    return it.folders[1] / "submodel.safetensors"


def map_file(it: Fleet) -> Path:
    return it.folders[1] / "index_map.safetensors"


def resave(it: Fleet, digest: str | None = None, examples: int | None = 5, **changes: np.ndarray | None) -> None:
    """Save client 1 again with some tensors replaced, added, or (None) removed; `__` in a name stands for a dot."""
    changed = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    tensors = {name: tensor for name, tensor in (it.submodels[1] | changed).items() if tensor is not None}
    save_client(it.folders[1], tensors, it.maps[1], examples, digest)


def remap(it: Fleet, name: str, entry: TensorMap | None, digest: str | None = None) -> None:
    tensors = {n: e for n, e in (it.maps[1].tensors | {name: entry}).items() if e is not None}
    write_index_map(map_file(it), IndexMap(digest or it.maps[1].checkpoint, tensors), PROVENANCE)


def changed(tensor: np.ndarray, value: float) -> np.ndarray:
    tensor = tensor.copy()
    tensor.reshape(-1)[-1] = value
    return tensor


def broken_map(it: Fleet, indices: list[int]) -> None:
    entry = it.maps[1].tensors["head.bias"]
    object.__setattr__(entry, "axes", (np.array(indices, np.int32),))
    remap(it, "head.bias", entry)


def break_pair(it: Fleet) -> None:
    entry = it.maps[1].tensors["bn1.running_mean"]
    count = entry.submodel_shape[0]
    other = np.arange(count, dtype=np.int32)
    if entry.axes[0] is None or np.array_equal(other, entry.axes[0]):
        other = other + 1
    remap(it, "bn1.running_mean", TensorMap(entry.shape, entry.dtype, (other,)))


FAULTS = {
    "no submodel": (submodel, "no such file", lambda it: submodel(it).unlink()),
    "no index map": (map_file, "no such file", lambda it: map_file(it).unlink()),
    "no folder": (
        lambda it: it.folders[1],
        "no such file or folder",
        lambda it: it.folders[1].rename(it.folders[1].parent / "x"),
    ),
    "submodel cut in its header": (submodel, "cut short", lambda it: os.truncate(submodel(it), 100)),
    "submodel cut in its data": (
        submodel,
        "cut short",
        lambda it: os.truncate(submodel(it), submodel(it).stat().st_size - 1),
    ),
    "map cut": (map_file, "cut", lambda it: os.truncate(map_file(it), map_file(it).stat().st_size - 1)),
    "global cut": (
        lambda it: it.checkpoint,
        "cut",
        lambda it: os.truncate(it.checkpoint, it.checkpoint.stat().st_size - 1),
    ),
    "pickle as submodel": (submodel, "pickles", lambda it: submodel(it).write_bytes(pickle.dumps({"w": [1.0] * 9}))),
    "pickle as global": (
        lambda it: it.checkpoint,
        "pickles",
        lambda it: it.checkpoint.write_bytes(pickle.dumps({"w": "12345678"})),
    ),
    "submodel without metadata": (submodel, "cahfp", lambda it: save_arrays(submodel(it), it.submodels[1], {})),
    "submodel as global": (
        lambda it: it.checkpoint,
        "cahfp.submodel/1",
        lambda it: it.checkpoint.write_bytes(submodel(it).read_bytes()),
    ),
    "map of another checkpoint": (
        map_file,
        "another checkpoint",
        lambda it: remap(it, "scale", it.maps[1].tensors["scale"], "0" * 64),
    ),
    "submodel of another checkpoint": (submodel, "another checkpoint", lambda it: resave(it, digest="0" * 64)),
    "missing tensor": (submodel, r"lacks 'bn1\.weight'", lambda it: resave(it, bn1__weight=None)),
    "extra tensor": (submodel, "'extra'", lambda it: resave(it, extra=np.zeros(2, np.float32))),
    "wrong shape": (submodel, "'head.bias' is F32", lambda it: resave(it, head__bias=np.zeros(3, np.float32))),
    "wrong dtype": (submodel, "'head.bias' is F64", lambda it: resave(it, head__bias=np.zeros(4))),
    "NaN": (
        submodel,
        "'head.bias' holds NaN",
        lambda it: resave(it, head__bias=changed(it.submodels[1]["head.bias"], np.nan)),
    ),
    "Inf": (
        submodel,
        "'head.bias' holds NaN or inf",
        lambda it: resave(it, head__bias=changed(it.submodels[1]["head.bias"], np.inf)),
    ),
    "negative variance": (
        submodel,
        "negative variance",
        lambda it: resave(it, bn1__running_var=-it.submodels[1]["bn1.running_var"]),
    ),
    "index out of range": (map_file, "index 4", lambda it: broken_map(it, [0, 1, 2, 4])),
    "index repeated": (map_file, "repeated", lambda it: broken_map(it, [0, 1, 1, 2])),
    "tensor not in the map": (map_file, "'scale'", lambda it: remap(it, "scale", None)),
    "map of a tensor that the global lacks": (
        map_file,
        "'more'",
        lambda it: remap(it, "more", it.maps[1].tensors["scale"]),
    ),
    "map with another global shape": (
        map_file,
        "'head.bias' is F32",
        lambda it: remap(it, "head.bias", TensorMap((5,), "F32", (None,))),
    ),
    "mean and variance of different channels": (lambda it: it.folders[1], "other channels", break_pair),
    "absurd num_examples": (lambda it: it.folders[1], "--weight", lambda it: resave(it, examples=10**300)),
    "report that is no JSON": (
        lambda it: it.folders[1] / "report.json",
        "not JSON",
        lambda it: (resave(it, examples=None), (it.folders[1] / "report.json").write_text("{")),
    ),
    "report with a negative count": (
        lambda it: it.folders[1] / "report.json",
        "positive integer",
        lambda it: (resave(it, examples=None), (it.folders[1] / "report.json").write_text('{"num_examples": -3}')),
    ),
}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_refused_and_leaves_no_output(tmp_path, fault, dry_run):
    file_of, words, damage = FAULTS[fault]
    it = fleet(tmp_path, 2, 2)
    damage(it)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match=words) as error:
        reconstruct(it.checkpoint, it.folders, out / "merged.safetensors", provenance=PROVENANCE, dry_run=dry_run)
    assert str(file_of(it)) in str(error.value)
    assert str(error.value).count("\n") <= 1
    assert list(out.iterdir()) == []


def test_a_signalling_nan_is_refused_without_a_warning(tmp_path):
    it = fleet(tmp_path, 2, 2, "BF16")
    resave(it, head__bias=np.full(4, 0x7F81, np.uint16).view(it.tensors["head.bias"].dtype))
    with warnings.catch_warnings(), pytest.raises(InputError, match=r"'head\.bias' holds NaN"):
        warnings.simplefilter("error")
        reconstruct(it.checkpoint, it.folders, tmp_path / "out", provenance=PROVENANCE)


def test_integers_that_differ_between_clients_stay_where_one_client_left_them(tmp_path):
    tensors = {"w": np.ones(3), "ids": np.arange(4)}
    save_global(tmp_path / "global", tensors)
    whole = IndexMap(
        arrays_digest(tensors), {"w": TensorMap((3,), "F64", (None,)), "ids": TensorMap((4,), "I64", (None,))}
    )
    folders = [save_client(tmp_path / f"c{n}", {"w": np.ones(3), "ids": np.arange(4) + n}, whole) for n in (0, 1)]
    reconstruct(tmp_path / "global", folders, tmp_path / "out", provenance=PROVENANCE)
    assert load(tmp_path / "out")["ids"].tolist() == [0, 1, 2, 3]


def test_a_result_that_its_dtype_cannot_hold_is_refused(tmp_path):
    tensors = {"running_mean": np.zeros(1, np.float16), "running_var": np.ones(1, np.float16)}
    save_global(tmp_path / "global", tensors)
    whole = IndexMap(arrays_digest(tensors), {name: TensorMap((1,), "F16", (None,)) for name in tensors})
    folders = [
        save_client(tmp_path / name, tensors | {"running_mean": np.array([mean], np.float16)}, whole)
        for name, mean in (("a", 60000), ("b", -60000))
    ]
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="'running_var' has numbers too large for F16"):
        reconstruct(tmp_path / "global", folders, tmp_path / "out" / "x", provenance=PROVENANCE)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_output_and_a_missing_folder_are_refused_before_any_work(tmp_path):
    it = fleet(tmp_path, 2, 1)
    for output, words in (
        (it.checkpoint, "--force"),
        (tmp_path / "no" / "x", "no such folder"),
        (it.folders[0], "--force"),
    ):
        with pytest.raises(InputError, match=words):
            reconstruct(it.checkpoint, it.folders, output, provenance=PROVENANCE)


def test_the_global_checkpoint_can_be_replaced_in_place(tmp_path):
    it = fleet(tmp_path, 2, 2)
    reconstruct(it.checkpoint, it.folders, tmp_path / "out", provenance=PROVENANCE)
    reconstruct(it.checkpoint, it.folders, it.checkpoint, provenance=PROVENANCE, force=True)
    assert it.checkpoint.read_bytes() == (tmp_path / "out").read_bytes()
