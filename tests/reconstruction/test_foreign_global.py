"""Global checkpoints as people have them: what `prune` takes, `reconstruct` takes, and gives back the network's own."""

import numpy as np
import pytest
import torch
from test_changed_files import shards

from cahfp_cli.checkpoint.digest import arrays_digest
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError
from cahfp_cli.formats.index_map import IndexMap
from cahfp_cli.reconstruction.merge import reconstruct
from tests.support.clients_on_disk import PROVENANCE, bits, cut, fleet, load, merge, save_client
from tests.support.commands import Done, run_here


def run_well_here(*arguments: object) -> Done:
    done = run_here(*arguments)
    assert done.code == 0, done.stderr
    return done


def as_wrapped(tensors, counters=True):
    """Under the names of torch's DataParallel, beside a tensor that is no part of the network."""
    own = {f"module.{name}": tensor for name, tensor in tensors.items() if counters or "tracked" not in name}
    return own | {"epoch_loss": np.ones(3, np.float32)}


def saved_by_torch(path, tensors, key=None):
    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    torch.save({key: state, "epoch": 3} if key else state, path)
    return path


@pytest.mark.parametrize("form", ["plain", "wrapped", "under a key", "wrapped safetensors", "wrapped shards"])
def test_a_foreign_checkpoint_is_merged_under_the_names_of_the_network(tmp_path, form):
    it = fleet(tmp_path, 4, 3, compensated=True)
    expected, _ = merge(it, "fill")
    foreign = tmp_path / "foreign"
    if form == "plain":
        saved_by_torch(foreign, it.tensors)
    elif form == "wrapped":
        saved_by_torch(foreign, as_wrapped(it.tensors))
    elif form == "under a key":
        saved_by_torch(foreign, as_wrapped(it.tensors), "state_dict")
    elif form == "wrapped safetensors":
        save_arrays(foreign, as_wrapped(it.tensors), {})
    else:
        foreign.mkdir()
        shards(foreign, as_wrapped(it.tensors))
    out = tmp_path / "out"
    done = run_well_here("reconstruct", foreign, *it.folders, "-o", out)
    assert {n: bits(t) for n, t in load(out).items()} == {n: bits(t) for n, t in expected.items()}
    assert ("left out, being no part of the network: 'epoch_loss'" in done.stderr) == (form != "plain")
    low = tmp_path / "low.partial.safetensors"
    run_well_here("reconstruct", foreign, *it.folders, "-o", low, "--partial")
    run_well_here("reconstruct", foreign, low, "-o", out, "--force")
    for name, tensor in load(out).items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-6, err_msg=name)


def test_counters_that_a_foreign_checkpoint_lacks_begin_at_zero(tmp_path):
    it = fleet(tmp_path, 4, 2)
    without = it.tensors | {name: np.zeros((), np.int64) for name in it.tensors if "tracked" in name}
    (tmp_path / "zero").mkdir()
    other = fleet(tmp_path / "zero", 4, 2, trained=False)
    save_arrays(tmp_path / "zero.safetensors", without, {})
    saved_by_torch(tmp_path / "g.pt", as_wrapped(it.tensors, counters=False))
    digest = arrays_digest(without)
    folders = [
        save_client(tmp_path / f"z{number}", cut(without, mapping), IndexMap(digest, mapping.tensors))
        for number, mapping in enumerate(other.maps)
    ]
    run_well_here("reconstruct", tmp_path / "g.pt", *folders, "-o", tmp_path / "out")
    assert {n: bits(t) for n, t in load(tmp_path / "out").items()} == {n: bits(t) for n, t in without.items()}


def test_the_round_before_may_be_one_too(tmp_path):
    it = fleet(tmp_path, 4, 2)
    before = {name: tensor + np.float32(0.5) if tensor.ndim else tensor for name, tensor in it.tensors.items()}
    save_arrays(tmp_path / "before", before, {})
    saved_by_torch(tmp_path / "before.pt", as_wrapped(before))
    momentum = ("--server-momentum", 0.5, "--before")
    for name in ("before", "before.pt"):
        run_well_here(
            "reconstruct", it.checkpoint, *it.folders, *momentum, tmp_path / name, "-o", f"{tmp_path}/{name}.out"
        )
    one, other = load(tmp_path / "before.out"), load(tmp_path / "before.pt.out")
    assert {n: bits(t) for n, t in one.items()} == {n: bits(t) for n, t in other.items()}


def test_a_client_cannot_choose_the_names_of_others(tmp_path):
    """Only names under which the checkpoint has the digest that a map claims are taken."""
    it = fleet(tmp_path, 4, 3)
    foreign = saved_by_torch(tmp_path / "g.pt", as_wrapped(it.tensors))
    own = it.maps[0]
    renamed = {f"conv.{name}": entry for name, entry in own.tensors.items()}
    save_client(
        it.folders[0],
        {f"conv.{name}": tensor for name, tensor in it.submodels[0].items()},
        IndexMap(own.checkpoint, renamed),
    )
    out = tmp_path / "out"
    run_well_here("reconstruct", foreign, *it.folders, "-o", out, "--skip-invalid")
    merged, _ = merge(it, folders=it.folders[1:])
    assert {n: bits(t) for n, t in load(out).items()} == {n: bits(t) for n, t in merged.items()}


def test_a_pickle_that_holds_code_is_refused_and_the_library_reads_none_unless_told_to(tmp_path):
    it = fleet(tmp_path, 4, 2)
    (tmp_path / "evil.pt").write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    done = run_here("reconstruct", tmp_path / "evil.pt", *it.folders, "-o", tmp_path / "out")
    assert done.code == 3 and "evil.pt" in done.stderr
    plain = saved_by_torch(tmp_path / "g.pt", it.tensors)
    with pytest.raises(InputError, match="pickle"):
        reconstruct(plain, it.folders, tmp_path / "out", provenance=PROVENANCE)
