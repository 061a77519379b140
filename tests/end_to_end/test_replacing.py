"""`--force` replaces what is ours, and nothing else: a folder that holds anything foreign is refused by its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from tests.support.commands import run_here
from tests.support.fleet import Fleet


def write_onnx(path: Path) -> None:
    graph = onnx.helper.make_graph([], "empty", [], [])
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())


FOREIGN: dict[str, Callable[[Path], object]] = {
    "notes.txt": lambda path: path.write_text("mine"),
    ".git": lambda path: (path.mkdir(), (path / "HEAD").write_text("mine")),
    "global.safetensors": lambda path: save_file({"w": np.ones(1)}, path),
    "submodel.safetensors": lambda path: save_file({"w": np.ones(1)}, path),
    "index_map.safetensors": lambda path: path.write_bytes(b"mine"),
    "curvature.safetensors": lambda path: save_file({"w": np.ones(1)}, path, {"cahfp": '{"format": "cahfp.scores/1"}'}),
    "report.json": lambda path: path.write_text(json.dumps({"title": "mine"})),
    "model.onnx": write_onnx,
    "model.int8.onnx": lambda path: path.mkdir(),
}


@pytest.fixture
def submodel(fleet: Fleet, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fleet.submodels["raspberry-pi-4"], tmp_path / "out"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    FOREIGN[name](folder / name)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("command", ["prune", "train"])
@pytest.mark.parametrize("among", ["with ours", "alone"])
def test_a_folder_with_anything_that_is_not_ours_is_refused_by_name(
    fleet: Fleet, submodel: Path, name: str, command: str, among: str
) -> None:
    if among == "alone":
        shutil.rmtree(submodel)
        submodel.mkdir()
    write(submodel, name)
    before = contents(submodel)
    arguments = {
        "prune": (fleet.checkpoint, "--scores", fleet.scores, "--keep", "0.5", "--no-onnx"),
        "train": (fleet.submodels["stm32h743"], "--steps", "1", "--no-onnx"),
    }
    done = run_here(command, *arguments[command], "-o", submodel, "--force")
    assert done.code == 3
    assert str(submodel) in done.stderr
    assert repr(name) in done.stderr
    assert contents(submodel) == before


def test_a_submodel_folder_of_ours_and_an_empty_one_are_replaced(fleet: Fleet, submodel: Path, tmp_path: Path) -> None:
    before = contents(submodel)
    (tmp_path / "empty").mkdir()
    for folder in (submodel, tmp_path / "empty"):
        arguments = (fleet.checkpoint, "--scores", fleet.scores, "--keep", "0.5", "--no-onnx", "-o", folder, "--force")
        assert run_here("prune", *arguments).code == 0
        assert contents(folder)["submodel.safetensors"] != before["submodel.safetensors"]
        assert "model.onnx" not in contents(folder)


def test_what_lies_beside_the_folders_of_several_devices_stays(fleet: Fleet, tmp_path: Path) -> None:
    shutil.copytree(fleet.submodels["raspberry-pi-4"], tmp_path / "out" / "raspberry-pi-4")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    arguments = ("--scores", fleet.scores, "--profile", "pi4", "--keep", "0.5", "--no-onnx", "--force")
    assert run_here("prune", fleet.checkpoint, *arguments, "-o", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "out" / "raspberry-pi-4" / "model.onnx").exists()


def test_an_output_does_not_replace_what_the_command_reads(fleet: Fleet, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copy(fleet.checkpoint, tmp_path / "g.safetensors"))
    (tmp_path / "link").symlink_to(checkpoint)
    folder = Path(shutil.copytree(fleet.submodels["stm32h743"], tmp_path / "client"))
    merge = ("reconstruct", checkpoint, folder, "--force")
    for arguments in (
        ("score", checkpoint, "-o", tmp_path / "link", "--force"),
        (*merge, "-o", folder / "submodel.safetensors"),
        (*merge, "-o", tmp_path / "new", "--report", checkpoint),
        (*merge, "-o", tmp_path / "new", "--html", folder / "report.json"),
    ):
        before = contents(tmp_path)
        done = run_here(*arguments)
        assert done.code == 2, done.stderr
        assert "is read by this command" in done.stderr
        assert contents(tmp_path) == before


def test_a_run_removes_only_its_own_files_of_other_rounds(tmp_path: Path) -> None:
    from cahfp_cli.federation.run import remove_leftovers

    for name in ("global-00001", "global-00002", "memory-00001", "memory-00002", "global-best", "memory-of-me"):
        (tmp_path / f"{name}.safetensors").write_text("")
    remove_leftovers(tmp_path, 2)
    left = ["global-00002", "global-best", "memory-00002", "memory-of-me"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == left
