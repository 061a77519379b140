"""What is merged are the bytes that passed the gate, and what is too large to be measured is refused."""

import json
import os

import numpy as np
import pytest
from test_robust import rewrite

from cahfp_cli.checkpoint import safetensors_file
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError
from cahfp_cli.reconstruction import merge as merging
from cahfp_cli.reconstruction.merge import reconstruct
from tests.support.clients_on_disk import PROVENANCE, bits, fleet, load, merge


@pytest.mark.parametrize("victim", ["global", "client"])
def test_a_file_rewritten_in_place_after_the_gate_is_refused(tmp_path, monkeypatch, victim):
    it = fleet(tmp_path, 3, 3)
    path = it.checkpoint if victim == "global" else it.folders[1] / "submodel.safetensors"
    with open_safetensors(path) as file:
        place = file.tensors["head.bias"].start
    measured = merging._measured

    def then_rewritten(*args):
        found = measured(*args)
        before = path.stat()
        with path.open("r+b") as file:
            file.seek(place)
            file.write(np.float32(1e20).tobytes())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as one who hides it would
        return found

    monkeypatch.setattr(merging, "_measured", then_rewritten)
    with pytest.raises(InputError, match="changed while it was in use"):
        reconstruct(it.checkpoint, it.folders, tmp_path / "out", provenance=PROVENANCE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("victim", ["global", "client", "shard"])
@pytest.mark.parametrize("change", ["link", "rights", "renamed and back"])
def test_a_file_whose_links_or_rights_change_meanwhile_is_still_the_same(tmp_path, monkeypatch, victim, change):
    it = fleet(tmp_path, 3, 3)
    checkpoint = it.checkpoint
    if victim == "shard":
        checkpoint = shards(tmp_path, it.tensors)
    path = {
        "global": checkpoint,
        "client": it.folders[1] / "submodel.safetensors",
        "shard": tmp_path / "b.safetensors",
    }[victim]
    out = tmp_path / ("out" if victim != "shard" else "merged")
    reconstruct(checkpoint, it.folders, out, provenance=PROVENANCE)
    undisturbed = load(out if victim != "shard" else out / "b.safetensors")
    measured = merging._measured

    def then_touched(*args):
        found = measured(*args)
        if change == "link":
            os.link(path, tmp_path / "backup")
        elif change == "rights":
            path.chmod(0o640)
        else:
            path.rename(tmp_path / "elsewhere").rename(path)
        return found

    monkeypatch.setattr(merging, "_measured", then_touched)
    reconstruct(checkpoint, it.folders, out, provenance=PROVENANCE, force=True)
    again = load(out if victim != "shard" else out / "b.safetensors")
    assert {n: bits(t) for n, t in again.items()} == {n: bits(t) for n, t in undisturbed.items()}


def shards(folder, tensors):
    """The tensors in two shards; the path of their index."""
    names = sorted(tensors)
    places = {name: f"{'ab'[number % 2]}.safetensors" for number, name in enumerate(names)}
    for file in set(places.values()):
        save_arrays(folder / file, {name: tensors[name] for name in names if places[name] == file}, {})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("audit", [False, True])
def test_how_often_the_global_checkpoint_is_read_does_not_depend_on_the_number_of_clients(
    tmp_path, monkeypatch, compensated, audit
):
    reads = {}
    for clients in (2, 6):
        (tmp_path / str(clients)).mkdir()
        it = fleet(tmp_path / str(clients), 3, clients, compensated=compensated, full=True)
        count, read_into, own = 0, safetensors_file._read_into, it.checkpoint.stat().st_ino

        def counted(handle, buffer, offset, read_into=read_into, ours=own):
            nonlocal count
            count += len(buffer) if os.fstat(handle).st_ino == ours else 0
            return read_into(handle, buffer, offset)

        monkeypatch.setattr(safetensors_file, "_read_into", counted)
        out = tmp_path / str(clients) / "out"
        reconstruct(it.checkpoint, it.folders, out, provenance=PROVENANCE, audit=audit)
        monkeypatch.setattr(safetensors_file, "_read_into", read_into)
        statistics = sum(t.nbytes for n, t in it.tensors.items() if n.endswith("running_mean"))
        reads[clients] = count - clients * statistics  # the gate compares each client's with them
    assert reads[2] == reads[6]


def test_an_update_too_large_for_a_norm_is_one_clients_fault(tmp_path):
    it = fleet(tmp_path, 3, 3, dtype="F64")
    alone, _ = merge(it, folders=it.folders[1:])
    for size in (1e154, 1e200):
        rewrite(it, 0, it.submodels[0] | {"head.weight": it.submodels[0]["head.weight"] * 0 + size})
        with pytest.raises(InputError, match="too large to have a norm"):
            merge(it, audit=True)
        merged, report = merge(it, audit=True, skip_invalid=True)
        assert [one.path for one in report.refused] == [it.folders[0]]
        assert {n: bits(t) for n, t in merged.items()} == {n: bits(t) for n, t in alone.items()}


def test_a_header_is_not_parsed_beyond_what_a_sound_one_has(tmp_path):
    """JSON takes thirty times its size once parsed, so a file within the limit of bytes may not be all header."""
    it = fleet(tmp_path, 3, 2, widths=(3, 300, 200))
    text = b'{"x":[' + b"{}," * 200_000 + b"{}]}"
    file = it.folders[0] / "submodel.safetensors"
    assert len(text) < file.stat().st_size
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match="its header has 600"):
        merge(it)
    assert load(it.checkpoint)
