"""Partial aggregates against all clients at once; independence of order, blocks and threads; shards."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cahfp_cli.checkpoint.atomic import check_folder_target
from cahfp_cli.checkpoint.digest import content_digest
from cahfp_cli.checkpoint.metadata import CheckpointMetadata, dump_metadata
from cahfp_cli.checkpoint.ownership import foreign_in_shards
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.sharded import open_checkpoint
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.reconstruction.merge import reconstruct
from tests.support.clients_on_disk import PROVENANCE, bits, curvature, fleet, load, merge

quick = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def partial(it, folders, name: str, **options) -> Path:
    path = it.checkpoint.parent / f"{name}.partial.safetensors"
    reconstruct(it.checkpoint, folders, path, partial=True, provenance=PROVENANCE, force=True, **options)
    return path


@pytest.mark.parametrize("rule", ["fill", "covered"])
@given(seed=st.integers(0, 2**32), clients=st.integers(2, 6), compensated=st.booleans())
@quick
def test_a_tree_of_aggregates_agrees_with_all_clients_at_once_to_one_ulp(rule, seed, clients, compensated):
    with tempfile.TemporaryDirectory() as folder:
        it = fleet(Path(folder), seed, clients, compensated=compensated)
        flat, report = merge(it, rule)
        low = partial(it, it.folders[:2], "low", rule=rule)
        middle = partial(it, [low, *it.folders[2:3]], "middle")
        tree, tree_report = merge(it, rule, folders=[middle, *it.folders[3:]])
        assert (tree_report.members, tree_report.coverage) == (report.members, report.coverage)
        for name, tensor in flat.items():
            if tensor.dtype == np.int64:
                assert bits(tensor) == bits(tree[name]), name
            else:
                assert (np.abs(tensor - tree[name]) <= np.spacing(np.abs(tensor))).all(), name


def test_aggregates_work_with_curvature_and_not_with_robust_rules(tmp_path):
    it = fleet(tmp_path, 4, 3)
    low = partial(it, it.folders[:2], "low")
    for rule in ("median", "trimmed-mean"):
        with pytest.raises(UsageError, match="every client's own values"):
            merge(it, rule, folders=[low, it.folders[2]])
        with pytest.raises(UsageError, match="every client's own values"):
            partial(it, it.folders, "x", rule=rule)
    with pytest.raises(UsageError, match="has the weights of its clients"):
        merge(it, folders=[low], weights={low: 3.0})
    with pytest.raises(InputError, match="without --keep-compensation"):
        merge(it, folders=[low], keep_compensation=True)


def test_aggregates_by_curvature_give_what_all_clients_give(tmp_path):
    it = fleet(tmp_path, 4, 5, dtype="F64")
    random = np.random.default_rng(0)
    for folder, submodel in zip(it.folders, it.submodels, strict=True):
        curvature(folder, submodel, lambda name, tensor: random.exponential(size=tensor.shape) ** 3)
    flat, _ = merge(it, "curvature")
    low = partial(it, it.folders[:2], "low", rule="curvature")
    middle = partial(it, [low, *it.folders[2:3]], "middle", rule="curvature")
    tree, _ = merge(it, "curvature", folders=[middle, *it.folders[3:]])
    for name, tensor in flat.items():
        np.testing.assert_allclose(tree[name], tensor, rtol=1e-13, err_msg=name)
    with pytest.raises(InputError, match="aggregated by curvature"):
        merge(it, "fill", folders=[middle, *it.folders[3:]])
    _, report = merge(it, "fill", folders=[middle, *it.folders[3:]], skip_invalid=True)
    assert [one.path for one in report.refused] == [middle]


def test_an_aggregate_of_next_to_no_weight_is_refused(tmp_path):
    it = fleet(tmp_path, 4, 2)
    low = partial(it, it.folders, "low")
    with open_safetensors(low) as file:
        arrays, record = {name: file.read(name) for name in file.tensors}, json.loads(file.metadata["cahfp"])
    for changes in ({"weight": 5e-324}, {"clients": 2**31}):
        save_arrays(low, arrays, {"cahfp": json.dumps(record | changes)})
        with pytest.raises(InputError, match=next(iter(changes))):
            merge(it, folders=[low])


DAMAGE = {
    "weight": lambda a: a | {"weight.conv1.weight": a["weight.conv1.weight"] * 1e6},
    "negative weight": lambda a: a | {"weight.conv1.weight": -a["weight.conv1.weight"] - 1},
    "count": lambda a: a | {"count.conv1.weight": a["count.conv1.weight"] + np.int32(9)},
    "count without weight": lambda a: a | {"weight.conv1.weight": a["weight.conv1.weight"] * 0},
    "shape": lambda a: a | {"weight.bn1.weight": np.ones(77)},
    "value dtype": lambda a: a | {"value.bn1.weight": a["value.bn1.weight"].astype(np.float32)},
    "nan": lambda a: a | {"value.bn1.weight": a["value.bn1.weight"] * np.nan},
    "variance": lambda a: a | {"value.bn1.running_var": -a["value.bn1.running_var"]},
    "too large": lambda a: a | {"value.head.bias": a["value.head.bias"] * 1e300},
    "counter": lambda a: a | {"value.bn1.num_batches_tracked": np.asarray(2**63 - 1)},
    "counter below 0": lambda a: a | {"value.bn1.num_batches_tracked": np.asarray(-5)},
    "far mean": lambda a: a | {"value.bn1.running_mean": a["value.bn1.running_mean"] + 1e30},
    "pair": lambda a: a | {"weight.bn1.running_mean": a["weight.bn1.running_mean"] * 0.5},
    "missing": lambda a: {name: array for name, array in a.items() if name != "value.scale"},
    "extra": lambda a: a | {"value.more": np.ones(2)},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_aggregate_is_refused_or_left_out(tmp_path, damage):
    it = fleet(tmp_path, 4, 3)
    low = partial(it, it.folders[:2], "low")
    with open_safetensors(low) as file:
        arrays, metadata = {name: file.read(name) for name in file.tensors}, file.metadata
    save_arrays(low, DAMAGE[damage](arrays), metadata)
    with pytest.raises(InputError, match=r"low\.partial\.safetensors: "):
        merge(it, folders=[low, it.folders[2]])
    left, report = merge(it, folders=[low, it.folders[2]], skip_invalid=True)
    alone, _ = merge(it, folders=[it.folders[2]])
    assert [one.path for one in report.refused] == [low]
    assert {n: bits(t) for n, t in left.items()} == {n: bits(t) for n, t in alone.items()}


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("rule", ["fill", "covered", "median", "trimmed-mean"])
def test_blocks_threads_and_order_change_no_bit(tmp_path, monkeypatch, rule, dtype):
    it = fleet(tmp_path, 8, 10, dtype, widths=(3, 40, 20), compensated=True)
    merge(it, rule, clip="median")
    whole = (tmp_path / "merged.safetensors").read_bytes()
    for size in (1 << 20, 5000, 100, 8):
        for module in ("cahfp_cli.checkpoint.digest", "cahfp_cli.reconstruction.round"):
            monkeypatch.setattr(f"{module}.BLOCK_BYTES", size)
        for threads in (1, 4) if size > 8 else (1,):
            merge(it, rule, clip="median", threads=threads, folders=it.folders[::-1])
            assert (tmp_path / "merged.safetensors").read_bytes() == whole, (size, threads)


def test_long_rows_are_added_as_short_ones(tmp_path, monkeypatch):
    it = fleet(tmp_path, 8, 4, widths=(3, 70, 30))
    plain, _ = merge(it)
    monkeypatch.setattr("cahfp_cli.reconstruction.average.LONG_ROW", 1)
    rows, _ = merge(it)
    assert {n: bits(t) for n, t in rows.items()} == {n: bits(t) for n, t in plain.items()}


def shard(it, folder: Path) -> Path:
    """The fleet's checkpoint in three files with an index."""
    folder.mkdir()
    names = sorted(it.tensors)
    weight_map = {name: f"model-0000{number % 3 + 1}-of-00003.safetensors" for number, name in enumerate(names)}
    for number, file in enumerate(sorted(set(weight_map.values()))):
        own = {name: it.tensors[name] for name in names if weight_map[name] == file}
        metadata = dump_metadata(CheckpointMetadata(provenance=PROVENANCE)) if number == 0 else {"part": str(number)}
        save_arrays(folder / file, own, metadata)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("by_folder", [False, True])
def test_a_sharded_checkpoint_comes_out_in_the_same_shards(tmp_path, by_folder):
    it = fleet(tmp_path, 3, 3)
    index = shard(it, tmp_path / "shards")
    assert content_digest(index) == content_digest(it.checkpoint)
    merged, _ = merge(it)
    out = tmp_path / "out"
    report = reconstruct(
        index.parent if by_folder else index, it.folders, out, provenance=PROVENANCE, threads=2, audit=True
    )
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in index.parent.iterdir())
    assert json.loads((out / index.name).read_text()) == json.loads(index.read_text())
    with open_checkpoint(out) as found:
        for name, info in found.tensors.items():
            assert bits(found.read_rows(name, 0, info.rows)) == bits(merged[name])
            assert found.shard_of[name] == json.loads(index.read_text())["weight_map"][name]
        assert found.shards["model-00002-of-00003.safetensors"].metadata["part"] == "1"
    assert report.digest == content_digest(tmp_path / "merged.safetensors")
    with pytest.raises(InputError, match="--force"):
        reconstruct(index, it.folders, out, provenance=PROVENANCE)
    reconstruct(index, it.folders, out, provenance=PROVENANCE, force=True)
    (out / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json.*would be lost"):
        reconstruct(index, it.folders, out, provenance=PROVENANCE, force=True)
    assert (out / "config.json").read_text() == "{}"
    renamed = index.rename(index.with_name("other.safetensors.index.json"))
    other = tmp_path / "other"
    reconstruct(renamed, it.folders, other, provenance=PROVENANCE)
    reconstruct(renamed, it.folders, other, provenance=PROVENANCE, force=True)


def test_shards_that_cahfp_did_not_write_are_not_replaced(tmp_path: Path) -> None:
    it = fleet(tmp_path, 2, 1)
    ours = shard(it, tmp_path / "shards").parent
    assert foreign_in_shards(ours) is None
    theirs = Path(shutil.copytree(ours, tmp_path / "theirs"))
    first = min(theirs.glob("*.safetensors"))
    placed = json.loads((theirs / "model.safetensors.index.json").read_text())["weight_map"]
    save_arrays(first, {name: it.tensors[name] for name, file in placed.items() if file == first.name}, {})
    with pytest.raises(InputError, match=r"index\.json"):
        check_folder_target(theirs, True, foreign_in_shards)
    with pytest.raises(InputError, match=r"index_map\.safetensors"):
        check_folder_target(it.folders[0], True, foreign_in_shards)


INDEX_FAULTS = {
    "no json": lambda index: "{",
    "no map": lambda index: "{}",
    "another folder": lambda index: json.dumps({"weight_map": {"scale": "../global.safetensors"}}),
    "no such shard": lambda index: json.dumps({"weight_map": dict.fromkeys(index["weight_map"], "no.safetensors")}),
    "forgotten": lambda index: json.dumps(
        {"weight_map": {n: f for n, f in index["weight_map"].items() if n != "scale"}}
    ),
    "too many": lambda index: json.dumps({"weight_map": index["weight_map"] | {"more": index["weight_map"]["scale"]}}),
    "twice": lambda index: json.dumps(index)[:-1] + ', "weight_map": {}}',
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_an_index_that_lies_is_refused(tmp_path, fault):
    it = fleet(tmp_path, 3, 1)
    index = shard(it, tmp_path / "shards")
    index.write_text(INDEX_FAULTS[fault](json.loads(index.read_text())))
    with pytest.raises(InputError) as error:
        reconstruct(index, it.folders, tmp_path / "out", provenance=PROVENANCE)
    assert str(tmp_path / "shards") in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_the_report_and_the_page_and_takes_the_servers_maps(tmp_path):
    it = fleet(tmp_path, 4, 3)
    maps = tmp_path / "maps"
    maps.mkdir()
    for number, folder in enumerate(it.folders):
        name = f"{folder.name}.safetensors" if number else f"{folder.name}/index_map.safetensors"
        (maps / name).parent.mkdir(exist_ok=True)
        (folder / "index_map.safetensors").rename(maps / name)
        (folder / "index_map.safetensors").write_text("what a client says")
    (it.folders[2] / "submodel.safetensors").write_bytes(b"<script>")
    code = "from cahfp_cli.app import main; main()"
    arguments = [
        *("reconstruct", it.checkpoint, *it.folders, "-o", tmp_path / "out.safetensors", "--json", "--skip-invalid"),
        *("--maps", maps, "--report", tmp_path / "report.json", "--html", tmp_path / "page.html", "--threads", "2"),
        *("--min-clients", "2", "--clip", "median"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "left out: " in done.stderr
    short, full = json.loads(done.stdout), json.loads((tmp_path / "report.json").read_text())
    assert {one["folder"]: one["accepted"] for one in short["clients"]} == {
        str(folder): number < 2 for number, folder in enumerate(it.folders)
    }
    counts = full.pop("entries_by_holders")
    assert full == short | {"format": "cahfp.reconstruction/1"}
    assert {name: sum(own) for name, own in counts.items()} == {
        name: tensor.size for name, tensor in it.tensors.items() if tensor.dtype == np.float32
    }
    assert all("agreement" in one and one["update"]["weights"]["norm"] > 0 for one in short["clients"][:2])
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert all(name in page for name in counts)
    assert load(tmp_path / "out.safetensors")
