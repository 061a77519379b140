"""`prune --dtype` through the command: the files, what is said of them, and that `evaluate` reads them."""

import json
from pathlib import Path

import onnx
import pytest

from tests.support.commands import Done, run, run_well
from tests.support.fleet import SUBMODEL_FILES, Fleet

ASKED = ("--macs", "0.8", "--calibration", "digits@train", "--samples", "300", "--rounds", "2", "--threads", "1")
FILES = {"fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}


def prune(fleet: Fleet, output: Path, *arguments: object) -> Done:
    return run_well("prune", fleet.checkpoint, "--scores", fleet.scores, *ASKED, *arguments, "-o", output)


@pytest.fixture(scope="module")
def made(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    folder = tmp_path_factory.mktemp("quantised")
    done = prune(fleet, folder / "first", "--dtype", "int8", "--dtype", "fp16", "--data", "digits@test", "--json")
    return folder / "first", done


def test_both_files_stand_beside_the_fp32_one_and_evaluate_agrees_with_the_report(made: tuple[Path, Done]) -> None:
    folder, done = made
    assert {path.name for path in folder.iterdir()} == {*SUBMODEL_FILES, *FILES.values()}
    report = json.loads((folder / "report.json").read_text())
    assert done.json["submodels"][0]["quantised"] == report["quantised"]
    assert report["quantised"].keys() == FILES.keys()
    fp32 = run_well("evaluate", folder / "model.onnx", "--no-latency", "--json").json
    for dtype, name in FILES.items():
        said, measured = report["quantised"][dtype], run_well("evaluate", folder / name, "--no-latency", "--json").json
        assert (said["file"], said["data"], said["samples"]) == (name, "digits@test", measured["samples"])
        assert (said["bytes"], said["accuracy"]) == (measured["bytes"], measured["accuracy"])
        assert said["bytes"] < report["onnx"]["bytes"]
        assert said["fp32_accuracy"] == fp32["accuracy"]
        assert said["agreement"] >= {"fp16": 0.98, "int8": 0.9}[dtype]
        props = {entry.key: entry.value for entry in onnx.load(folder / name).metadata_props}
        whole = {entry.key: entry.value for entry in onnx.load(folder / "model.onnx").metadata_props}
        assert props == {**whole, "cahfp.dtype": dtype}
    assert report["quantised"]["int8"]["layout"].keys() == {"activations", "symmetric", "reduce_range"}


def test_the_same_command_gives_the_same_bytes_and_a_table(made: tuple[Path, Done], fleet: Fleet) -> None:
    folder = made[0]
    again = prune(fleet, folder.parent / "again", "--dtype", "fp16", "--dtype", "int8", "--data", "digits@test")
    for name in FILES.values():
        assert (folder.parent / "again" / name).read_bytes() == (folder / name).read_bytes()
    for word in ("int8", "fp16", "same class", "largest difference"):
        assert word in again.stdout


@pytest.mark.slow
def test_without_data_labels_are_not_read_and_fp32_adds_nothing(fleet: Fleet, tmp_path: Path) -> None:
    prune(fleet, tmp_path / "n100", "--profile", "n100", "--dtype", "fp32", "--dtype", "int8")
    folder = tmp_path / "n100" / "intel-n100"
    assert {path.name for path in folder.iterdir()} == {*SUBMODEL_FILES, "model.int8.onnx"}
    said = json.loads((folder / "report.json").read_text())["quantised"]["int8"]
    assert (said["data"], said["samples"], said["accuracy"], said["fp32_accuracy"]) == ("digits@train", 300, None, None)
    assert said["layout"] == {"activations": "uint8", "symmetric": False, "reduce_range": False}


REFUSALS = {
    "no such dtype": (("--keep", "0.5", "--dtype", "int4"), ("int4", "fp32, fp16 or int8")),
    "int8 without samples": (("--keep", "0.5", "--dtype", "int8"), ("--calibration SPEC",)),
    "fp16 without samples": (("--keep", "0.5", "--dtype", "fp16"), ("--calibration SPEC", "--data SPEC")),
    "no file to start from": ((*ASKED, "--dtype", "int8", "--no-onnx"), ("--no-onnx",)),
    "device without int8": ((*ASKED, "--profile", "coral", "--dtype", "int8"), ("coral-dev-board", "takes fp32 only")),
    "device without fp16": (
        (*ASKED, "--profile", "n100", "--dtype", "fp16"),
        ("intel-n100", "takes fp32 and int8 only"),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(fleet: Fleet, tmp_path: Path, name: str) -> None:
    arguments, words = REFUSALS[name]
    done = run("prune", fleet.checkpoint, "--scores", fleet.scores, *arguments, "-o", tmp_path / "out")
    assert (done.code, done.stdout) == (2, "")
    assert all(word in done.stderr for word in words), done.stderr
    assert list(tmp_path.iterdir()) == []
