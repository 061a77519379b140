"""`cahfp inspect` on every kind of file that we write, for people and for scripts."""

from pathlib import Path

import pytest

from tests.support.commands import run, run_well
from tests.support.fleet import SUBMODEL_FILES, Clients, Fleet

PROFILE = Path(__file__).parents[2] / "profiles" / "stm32h743.toml"
KINDS = {
    "global": "checkpoint",
    "merged": "checkpoint",
    "scores": "scores",
    "fleet": "submodels",
    "submodel": "submodel folder",
    "trained": "submodel folder",
    "submodel.safetensors": "submodel",
    "index_map.safetensors": "index map",
    "model.onnx": "ONNX",
    "report.json": "report",
    "profile": "device profile",
    "foreign": "checkpoint (not written by cahfp)",
}


@pytest.fixture
def paths(fleet: Fleet, clients: Clients, tmp_path: Path) -> dict[str, Path]:
    from safetensors.numpy import load_file, save_file

    save_file(load_file(fleet.checkpoint), tmp_path / "foreign.safetensors")
    submodel = fleet.submodels["stm32h743"]
    return {
        "global": fleet.checkpoint,
        "merged": clients.merged,
        "scores": fleet.scores,
        "fleet": fleet.folder / "fleet",
        "submodel": submodel,
        "trained": clients.folders["stm32h743"],
        **{name: submodel / name for name in SUBMODEL_FILES},
        "profile": PROFILE,
        "foreign": tmp_path / "foreign.safetensors",
    }


@pytest.mark.parametrize("which", KINDS)
def test_each_kind_is_told_to_people_and_to_scripts(paths: dict[str, Path], which: str) -> None:
    human, machine = run_well("inspect", paths[which]), run_well("inspect", paths[which], "--json")
    assert human.stderr == machine.stderr == ""
    assert machine.json["kind"] == KINDS[which]
    assert machine.json["file"] == str(paths[which])
    assert f"kind: {KINDS[which]}" in human.stdout.splitlines()
    assert all(key in human.stdout for key in machine.json)
    assert "{'" not in human.stdout and "[{" not in human.stdout


def test_the_figures_are_those_of_the_files(paths: dict[str, Path], fleet: Fleet, clients: Clients) -> None:
    told = {which: run_well("inspect", paths[which], "--json").json for which in ("global", "foreign", "scores")}
    assert told["global"]["bytes"] == fleet.checkpoint.stat().st_size
    assert told["global"]["digest"] == told["foreign"]["digest"] == told["scores"]["checkpoint"]
    assert told["global"]["model"]["spec"] == "resnet20"
    assert told["global"]["provenance"]["options"]["seed"] == 0
    scored = fleet.said["score"].json
    assert told["scores"]["groups"] == scored["groups"]
    assert sum(family["groups"] for family in told["scores"]["families"]) == scored["groups"]
    assert max(family["max"] for family in told["scores"]["families"]) == scored["significance"]["max"]
    submodel = run_well("inspect", paths["trained"], "--json").json["files"]
    assert set(submodel) == set(SUBMODEL_FILES)
    assert submodel["submodel.safetensors"]["num_examples"] == 90
    assert submodel["submodel.safetensors"]["elements"] == submodel["index_map.safetensors"]["elements"]["kept"]
    assert submodel["index_map.safetensors"]["elements"]["of"] == told["global"]["elements"]
    assert submodel["model.onnx"]["inputs"] == {"input": ["batch", 1, 8, 8]}


def test_an_onnx_file_whose_text_is_no_text_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    content = (fleet.submodels["stm32h743"] / "model.onnx").read_bytes()
    assert b"Conv" in content
    (tmp_path / "model.onnx").write_bytes(content.replace(b"Conv", b"Con\xff"))
    done = run("inspect", tmp_path / "model.onnx")
    assert done.code == 3
    assert "not a valid ONNX file" in done.stderr
