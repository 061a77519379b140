"""Same inputs and seed give the same bytes, wherever the files lie and whatever the outputs are called."""

import shutil
from pathlib import Path

import pytest

from cahfp_cli.provenance import portable
from tests.support.commands import start_well
from tests.support.fleet import LOCAL_TRAIN, PRUNE, SCORE, SHARES, SUBMODEL_FILES, TRAIN, Clients, Fleet


def same_folder(one: Path, two: Path) -> None:
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_training_from_scratch_twice(fleet: Fleet, tmp_path: Path) -> None:
    done = start_well("train", *TRAIN, "-o", tmp_path / "another.safetensors", "--quiet")
    assert done.stderr == ""
    assert "another.safetensors: 1442 samples" in done.stdout
    assert (tmp_path / "another.safetensors").read_bytes() == fleet.checkpoint.read_bytes()


def test_scoring_twice(fleet: Fleet, tmp_path: Path) -> None:
    shutil.copy(fleet.checkpoint, tmp_path)
    done = start_well("score", tmp_path / "global.safetensors", *SCORE, "-o", "again.safetensors", "-q", cwd=tmp_path)
    assert done.stderr == ""
    assert (tmp_path / "again.safetensors").read_bytes() == fleet.scores.read_bytes()


def test_pruning_twice_and_alone_instead_of_with_other_devices(fleet: Fleet, tmp_path: Path) -> None:
    for file in (fleet.checkpoint, fleet.scores):
        shutil.copy(file, tmp_path)
    arguments = ("global.safetensors", "--scores", "scores.safetensors", "--profile", "stm32", *PRUNE)
    done = start_well("prune", *arguments, "--data", "digits@test", "-o", "alone", "--quiet", cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout.endswith("wrote alone/stm32h743\n")
    assert len(list((tmp_path / "alone" / "stm32h743").iterdir())) == len(SUBMODEL_FILES)
    same_folder(tmp_path / "alone" / "stm32h743", fleet.submodels["stm32h743"])


def test_training_a_submodel_twice(fleet: Fleet, clients: Clients, tmp_path: Path) -> None:
    shutil.copytree(fleet.submodels["stm32h743"], tmp_path / "received" / "stm32h743")
    shutil.copy(clients.folder / "stm32h743.npz", tmp_path)
    arguments = ("received/stm32h743", "--data", "npz:stm32h743.npz", *LOCAL_TRAIN)
    done = start_well("train", *arguments, "-o", "sent", "--quiet", cwd=tmp_path)
    assert done.stderr == ""
    same_folder(tmp_path / "sent", clients.folders["stm32h743"])


def test_reconstructing_twice_in_another_order_and_folder(fleet: Fleet, clients: Clients, tmp_path: Path) -> None:
    shutil.copytree(clients.folder / "clients", tmp_path / "inbox")
    folders = [f"inbox/{name}" for name in reversed(SHARES)]
    done = start_well("reconstruct", fleet.checkpoint, *folders, "-o", "new.safetensors", "--quiet", cwd=tmp_path)
    assert done.stderr == ""
    assert (tmp_path / "new.safetensors").read_bytes() == clients.merged.read_bytes()


@pytest.mark.parametrize(
    ("spec", "recorded"),
    [
        ("npz:/data/me/share.npz@train[0:100]", "npz:share.npz@train[0:100]"),
        ("folder:/data/images/", "folder:images"),
        ("/home/me/net.py:make", "net.py:make"),
        ("npz:shares/a.npz", "npz:shares/a.npz"),
        ("digits@test[:50]", "digits@test[:50]"),
        ("package.module:factory", "package.module:factory"),
    ],
)
def test_specs_are_recorded_without_the_folders_of_this_machine(spec: str, recorded: str) -> None:
    assert portable(spec) == recorded
