"""What is merged are the bytes that passed the gate, and what is too large to be measured is refused."""

import os

import numpy as np
import pytest
from fleet import PROVENANCE, bits, fleet, load, merge
from test_robust import rewrite

from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.errors import InputError
from cahfp_cli.reconstruction import merge as merging
from cahfp_cli.reconstruction.merge import reconstruct


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
