"""`cahfp inspect` knows every file and folder that any command leaves behind."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.support.commands import run_here
from tests.support.fleet import Clients, Fleet

EXPERIMENT = """
partitions = ["iid"]
methods = ["cahfp"]
rounds = 1
clients_per_round = 2
[model]
spec = "vgg11"
args = { width = 0.0625 }
[data]
train = "digits@train[0:120]"
test = "digits@test[0:40]"
[[fleet]]
count = 2
keep = 0.5
[selection]
samples = 8
"""
KINDS = {
    *(
        "checkpoint",
        "shard",
        "scores",
        "submodel folder",
        "submodels",
        "submodel",
        "index map",
        "curvature",
        "ONNX",
        "report",
    ),
    *("partial aggregate", "report of a reconstruction", "page", "figure", "device profile", "experiment"),
    *("simulation", "state of a run", "memory of a run", "summary of a simulation", "figures of a simulation"),
}
OF_FOLDERS = {"fleet", "submodel", "shards", "simulation", "seed0"}


@pytest.fixture(scope="module")
def everything(fleet: Fleet, clients: Clients, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One output of every kind that a command writes."""
    folder = tmp_path_factory.mktemp("everything")
    for source in (fleet.checkpoint, fleet.scores):
        shutil.copy(source, folder)
    shutil.copytree(fleet.folder / "fleet", folder / "fleet")
    (folder / "experiment.toml").write_text(EXPERIMENT)
    client = clients.folders["stm32h743"]
    merge = (*clients.folders.values(), "--report", folder / "merge.json", "--html", folder / "merge.html")
    curved = ("--steps", "1", "--curvature", "8", "--data", "digits@train[:32]")
    weights = load_file(fleet.checkpoint)
    placed = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(weights))}
    (folder / "theirs").mkdir()
    for file in set(placed.values()):
        save_file({name: weights[name] for name in placed if placed[name] == file}, folder / "theirs" / file)
    (folder / "theirs" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    for command in (
        ("reconstruct", fleet.checkpoint, *merge, "-o", folder / "merged.safetensors"),
        ("reconstruct", fleet.checkpoint, client, "--partial", "-o", folder / "low.partial.safetensors"),
        ("reconstruct", folder / "theirs", client, "-o", folder / "shards"),
        ("train", client, *curved, "--no-onnx", "-o", folder / "submodel"),
        ("inspect", fleet.scores, "--plot", folder / "scores.svg"),
        ("profile", "show", "pi4", "--plot", folder / "roofline.pdf"),
        ("simulate", folder / "experiment.toml", "-o", folder / "simulation"),
    ):
        done = run_here(*command, "--quiet") if command[0] not in ("inspect", "profile") else run_here(*command)
        assert done.code == 0, done.stderr
    shutil.rmtree(folder / "theirs")
    shutil.copy(Path(__file__).parents[2] / "profiles" / "stm32h743.toml", folder)
    return folder


def kind_of(path: Path) -> str:
    human, machine = run_here("inspect", path), run_here("inspect", path, "--json")
    assert human.code == machine.code == 0, f"{path}: {human.stderr}"
    assert f"kind: {machine.json['kind']}" in human.stdout.splitlines()
    assert machine.json["file"] == str(path)
    return str(machine.json["kind"])


def test_every_file_and_folder_that_a_command_writes_is_known(everything: Path) -> None:
    found = {
        path: kind_of(path)
        for path in sorted(everything.rglob("*"))
        if path.is_file() or path.name in OF_FOLDERS or path.parent.name == "fleet"
    }
    assert set(found.values()) == KINDS
    assert found[everything / "shards"] == found[everything / "shards" / "model.safetensors.index.json"] == "checkpoint"


def test_a_simulation_says_how_far_it_is(everything: Path, tmp_path: Path) -> None:
    told = run_here("inspect", everything / "simulation", "--json").json
    assert told["runs"] == [{"partition": "iid", "method": "cahfp", "seed": "seed0", "rounds": 1}]
    assert told["finished"] is True
    assert told["methods"] == ["cahfp"]
    begun = Path(shutil.copytree(everything / "simulation", tmp_path / "begun"))
    (begun / "summary.json").unlink()
    shutil.rmtree(begun / "runs")
    told = run_here("inspect", begun, "--json").json
    assert (told["finished"], told["runs"]) == (False, [])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "[]"),
        ("a.json", '[{"round": "1"}]'),
        ("a.json", '{"format": "mine"}'),
        ("a.json", '{"experiment": 1, "results": 2}'),
        ("a.json", "9" * 5000),
        ("a.jsonl", ""),
        ("a.jsonl", '{"round": 1}\n{'),
        ("a.html", "<html>"),
        ("a.png", "mine"),
        ("a.svg", "mine"),
        ("a.toml", "methods = 1"),
        ("a.toml", "= ="),
        ("model.onnx.data", "mine"),
        ("model.safetensors.index.json", "{}"),
    ],
)
def test_what_only_looks_like_ours_is_refused(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    refused = run_here("inspect", tmp_path / name)
    assert refused.code == 3, refused.stdout
    assert name in refused.stderr


def test_a_folder_that_no_command_writes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused = run_here("inspect", tmp_path)
    assert (refused.code, "not a submodel folder" in refused.stderr) == (3, True)
