"""What our own commands write is within the limits of what `reconstruct` reads, however large it is."""

import numpy as np
import pytest

from cahfp_cli.checkpoint.digest import arrays_digest
from cahfp_cli.checkpoint.metadata import KEY, InputFile
from cahfp_cli.checkpoint.safetensors_file import MAX_NAME_LENGTH, open_safetensors
from cahfp_cli.errors import InputError
from cahfp_cli.formats.index_map import IndexMap, TensorMap
from cahfp_cli.formats.report import most_bytes, read_report, write_report
from cahfp_cli.reconstruction import writing
from cahfp_cli.reconstruction.merge import reconstruct
from tests.support.clients_on_disk import PROVENANCE, bits, load, save_client, save_global


def whole(tensors):
    maps = {name: TensorMap(t.shape, "F32", (None,) * t.ndim) for name, t in tensors.items()}
    return IndexMap(arrays_digest(tensors), maps)


def test_the_report_of_a_submodel_of_very_many_groups_is_read(tmp_path):
    tensors = {"w": np.ones((100_000, 1), np.float32)}
    checkpoint = save_global(tmp_path / "global", tensors)
    client = save_client(tmp_path / "client", tensors, whole(tensors), num_examples=None)
    write_report(client / "report.json", {"kept_groups": list(range(100_000)), "num_examples": 77})
    assert (client / "report.json").stat().st_size > 1_000_000 and read_report(client / "report.json")
    report = reconstruct(checkpoint, [client], tmp_path / "out", provenance=PROVENANCE)
    assert report.clients[0].num_examples == 77
    with open_safetensors(checkpoint) as file, (client / "report.json").open("a") as text:
        text.write(" " * most_bytes(file))
    with pytest.raises(InputError, match="larger than any report"):
        reconstruct(checkpoint, [client], tmp_path / "other", provenance=PROVENANCE)


def test_an_aggregate_may_list_the_files_of_thousands_of_clients(tmp_path, monkeypatch):
    tensors = {"w": np.ones(3, np.float32)}
    checkpoint = save_global(tmp_path / "global", tensors)
    client = save_client(tmp_path / "client", {"w": np.full(3, 2, np.float32)}, whole(tensors))
    low = tmp_path / "low.partial.safetensors"
    many = tuple(InputFile(file=f"client-{n}/submodel.safetensors", sha256=f"{n:064x}") for n in range(5000))
    long = PROVENANCE.model_copy(update={"inputs": many})
    monkeypatch.setattr("cahfp_cli.reconstruction.merge._completed", lambda *arguments: long)
    reconstruct(checkpoint, [client], low, partial=True, provenance=PROVENANCE)
    with open_safetensors(low) as file:
        assert len(file.metadata[KEY]) > 500_000
    reconstruct(checkpoint, [low], tmp_path / "out", provenance=PROVENANCE)
    assert load(tmp_path / "out")["w"].tolist() == [2, 2, 2]
    monkeypatch.setattr(writing, "RECORD_BYTES", 500_000)
    with pytest.raises(InputError, match="aggregate fewer clients at a time"):
        reconstruct(checkpoint, [client], tmp_path / "more", partial=True, provenance=PROVENANCE)
    monkeypatch.setattr(writing, "MOST_CLIENTS", 0)
    with pytest.raises(InputError, match="1 clients are too many"):
        reconstruct(checkpoint, [client], tmp_path / "more", partial=True, provenance=PROVENANCE)


@pytest.mark.parametrize("letter", ["n", "\u540d", "\U0001f600"])
def test_tensors_may_have_the_longest_names(tmp_path, letter):
    tensors = {f"{letter * (MAX_NAME_LENGTH - 4)}{n:04}": np.full(1, n, np.float32) for n in range(200)}
    checkpoint = save_global(tmp_path / "global", tensors)
    client = save_client(tmp_path / "client", tensors, whole(tensors))
    reconstruct(checkpoint, [client], tmp_path / "out", provenance=PROVENANCE)
    assert {n: bits(t) for n, t in load(tmp_path / "out").items()} == {n: bits(t) for n, t in tensors.items()}
    with pytest.raises(InputError, match="too long for an aggregate"):
        reconstruct(checkpoint, [client], tmp_path / "more", partial=True, provenance=PROVENANCE)
