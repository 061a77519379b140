"""A whole round on a global checkpoint in several files, as model hubs keep large ones."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.support.commands import run, run_well
from tests.support.fleet import Clients, Fleet

INDEX = "model.safetensors.index.json"


@pytest.fixture
def shards(fleet: Fleet, tmp_path: Path) -> Path:
    """The fleet's checkpoint in three files; the metadata are in the first."""
    folder, tensors = tmp_path / "shards", load_file(fleet.checkpoint)
    folder.mkdir()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{number % 3 + 1}-of-00003.safetensors" for number, name in enumerate(names)}
    header = fleet.checkpoint.read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    for number, file in enumerate(sorted(set(weight_map.values()))):
        own = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(own, folder / file, metadata if number == 0 else None)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("named", ["", INDEX])
def test_a_round_on_shards_is_that_on_one_file(named: str, shards: Path, fleet: Fleet, tmp_path: Path) -> None:
    checkpoint = shards / named
    scores = tmp_path / "scores.safetensors"
    run_well("score", checkpoint, "--criterion", "l2", "-o", scores)
    for source, output in ((checkpoint, "sharded"), (fleet.checkpoint, "single")):
        run_well("prune", source, "--scores", scores, "--macs", 0.5, "--no-onnx", "-o", tmp_path / output)
    (folder,) = (path.parent for path in (tmp_path / "sharded").rglob("index_map.safetensors"))
    single = tmp_path / "single" / folder.relative_to(tmp_path / "sharded")
    one, other = load_file(folder / "submodel.safetensors"), load_file(single / "submodel.safetensors")
    assert one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)

    run_well("reconstruct", checkpoint, folder, "-o", tmp_path / "merged")
    run_well("reconstruct", fleet.checkpoint, single, "-o", tmp_path / "merged.safetensors")
    whole = load_file(tmp_path / "merged.safetensors")
    found = {
        name: array for path in (tmp_path / "merged").glob("*.safetensors") for name, array in load_file(path).items()
    }
    assert found.keys() == whole.keys() and all(found[name].tobytes() == whole[name].tobytes() for name in whole)
    sharded, single_file = (
        run_well("evaluate", tmp_path / name, "--data", "digits@test[0:50]", "--no-latency", "--json").json
        for name in ("merged", "merged.safetensors")
    )
    assert sharded["accuracy"] == single_file["accuracy"]
    assert sharded["bytes"] == sum(path.stat().st_size for path in (tmp_path / "merged").iterdir())
    assert single_file["bytes"] == (tmp_path / "merged.safetensors").stat().st_size


def test_curvature_of_a_checkpoint_in_shards_is_refused_as_of_any_other(shards: Path, tmp_path: Path) -> None:
    done = run("train", shards, "--curvature", 8, "--steps", 1, "-o", tmp_path / "out")
    assert done.code == 2 and "SUBMODEL_DIR" in done.stderr and not (tmp_path / "out").exists()


def test_damaged_shards_are_named(shards: Path, fleet: Fleet, tmp_path: Path) -> None:
    arguments = ("--scores", fleet.scores, "--macs", 0.5, "-o", tmp_path / "out")
    index = json.loads((shards / INDEX).read_text())
    (shards / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(index["weight_map"], "../x.safetensors")}))
    assert run("prune", shards, *arguments).code == 3
    (shards / INDEX).write_text(json.dumps(index))
    missing = shards / "model-00002-of-00003.safetensors"
    missing.rename(tmp_path / "aside.safetensors")
    done = run("prune", shards, *arguments)
    assert done.code == 3 and missing.name in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_submodel_folder_is_still_no_global_checkpoint(clients: Clients, fleet: Fleet, tmp_path: Path) -> None:
    folder = next(iter(fleet.submodels.values()))
    done = run("prune", folder, "--scores", fleet.scores, "--macs", 0.5, "-o", tmp_path / "out")
    assert done.code == 2 and "is a folder" in done.stderr
