"""`prune --calibration` and what `score` says of itself, through the command, each product checked with other tools."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cahfp_cli.commands.networks import open_network
from cahfp_cli.coupling.analysis import analyse
from cahfp_cli.data.spec import load_data
from cahfp_cli.significance.measure import split, subset
from tests.support.commands import Done, run, run_well, start_well
from tests.support.fleet import Fleet

SAMPLES = 300
DIVERGENCE = {"predicted", "measured", "final", "fitted", "held_out"}
CALIBRATED = ("--calibration", "digits@train", "--samples", SAMPLES, "--rounds", 3, "--macs", "0.6", "--threads", 1)


@dataclass(frozen=True)
class Made:
    """The folder that `prune --calibration` wrote, what it printed, and its report."""

    folder: Path
    said: Done

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text())

    @property
    def table(self) -> dict[str, Any]:
        with safe_open(self.folder / "index_map.safetensors", "numpy") as file:
            return json.loads(file.metadata()["cahfp"])["tensors"]


def prune(fleet: Fleet, output: Path, *arguments: object) -> Made:
    inputs = (fleet.checkpoint, "--scores", fleet.scores)
    return Made(output, run_well("prune", *inputs, *arguments, "--json", "-o", output))


@pytest.fixture(scope="module")
def made(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Made:
    output = tmp_path_factory.mktemp("calibrated") / "half"
    return prune(fleet, output, *CALIBRATED, "--data", "digits@test")


def gathered(fleet: Fleet, made: Made) -> dict[str, np.ndarray]:
    """The global checkpoint's entries that the index map names, times its factors, by numpy alone."""
    whole, arrays = load_file(fleet.checkpoint), load_file(made.folder / "index_map.safetensors")
    found = {}
    for name, entry in made.table.items():
        tensor = whole[name]
        for axis, number in enumerate(entry["axes"]):
            tensor = tensor if number is None else tensor.take(arrays[f"index.{number}"], axis)
        for axis, number in enumerate(entry.get("factors", ())):
            if number is not None:
                shape = [-1 if other == axis else 1 for other in range(tensor.ndim)]
                tensor = tensor * arrays[f"factor.{number}"].reshape(shape)
        found[name] = tensor
    return found


def same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    assert found.keys() == expected.keys()
    return all((found[n].dtype, found[n].tobytes()) == (expected[n].dtype, expected[n].tobytes()) for n in expected)


# --- score -----------------------------------------------------------------------------------------------------------


def test_score_says_how_far_it_can_be_trusted_and_records_it(fleet: Fleet) -> None:
    judged = fleet.said["score"].json["trust"]
    assert judged.keys() == {
        *("reliability", "effective_samples", "sets", "samples", "accuracy", "chance", "certainty")
    }
    assert judged["samples"] == 64 and judged["chance"] < judged["accuracy"] <= 1 and 0 < judged["certainty"] <= 1
    assert 0.5 < judged["reliability"] <= 1
    assert 1 <= judged["effective_samples"] <= 64
    groups = [one["groups"] for one in judged["sets"]]
    assert groups and groups == sorted(groups)
    for one in judged["sets"]:
        assert one.keys() == {"share", "groups", "predicted", "measured"}
        assert one["predicted"] > 0 and one["measured"] > 0
    with safe_open(fleet.scores, "numpy") as file:
        assert json.loads(file.metadata()["cahfp"])["trust"] == judged
        assert file.get_tensor("interactions").shape[1] == fleet.said["score"].json["groups"]
    assert ("few samples" in fleet.said["score"].stderr) == (judged["effective_samples"] < 10)


@pytest.fixture(scope="module")
def without_interactions(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    how = ("--data", "digits@train[:600]", "--samples", 64, "--held-out", 0, "--threads", 1)
    said = run_well("score", fleet.checkpoint, *how, "--no-interactions", "-o", path).stdout
    assert "not put to the test" in said
    return path


def test_scores_without_interactions_are_the_same_scores(fleet: Fleet, without_interactions: Path) -> None:
    found, expected = load_file(without_interactions), load_file(fleet.scores)
    assert expected.keys() - found.keys() == {"interactions"}
    for name, array in found.items():
        assert np.array_equal(array, expected[name]), name


# --- prune -----------------------------------------------------------------------------------------------------------


def test_the_report_says_how_it_was_selected_and_what_came_of_it(fleet: Fleet, made: Made) -> None:
    report = made.report
    assert made.said.json["written"] is True
    (said,) = made.said.json["submodels"]
    assert {key: said[key] for key in report if key != "format"} == {k: v for k, v in report.items() if k != "format"}
    assert report["selection"] == {
        "selection": "linear",
        "calibration": "digits@train",
        "samples": SAMPLES,
        "seed": 0,
        "batch_size": 64,
        "rounds": 3,
        "compensate": True,
        "reference": "network",
        "recalibrate": False,
    }
    assert report["selection"].items() <= report["provenance"]["options"].items()
    kept = report["kept_groups"]
    assert kept == sorted(set(kept)) and len(kept) == report["groups"]["kept"] < report["groups"]["of"]
    assert report["predicted"]["macs"] <= report["budget"]["limits"]["macs"] == 0.6 * report["full"]["macs"]
    assert report["compensation"]["gates_moved"] > 0.5 * len(kept)
    assert 0.25 <= report["compensation"]["least"] < 1 < report["compensation"]["greatest"] <= 4
    divergence = report["divergence"]
    assert divergence.keys() == DIVERGENCE
    assert 0 < divergence["fitted"] < divergence["measured"] and divergence["predicted"] > 0
    assert divergence["final"] > 0 and divergence["held_out"] == SAMPLES // 4


def test_kept_groups_are_those_of_the_index_map(fleet: Fleet, made: Made) -> None:
    network = open_network(fleet.checkpoint, warn=print)
    groups = analyse(network.model, network.input_shape).groups
    kept = np.isin(np.arange(groups.count), made.report["kept_groups"])
    arrays = load_file(made.folder / "index_map.safetensors")
    for name, axes in groups.indices(kept).items():
        for number, expected in zip(made.table[name]["axes"], axes, strict=True):
            assert (number is None) == (expected is None)
            assert expected is None or np.array_equal(arrays[f"index.{number}"], expected)


def test_the_submodel_is_what_numpy_gathers_times_the_factors(fleet: Fleet, made: Made) -> None:
    found = load_file(made.folder / "submodel.safetensors")
    assert same_bits(found, gathered(fleet, made))
    scaled = {name for name, entry in made.table.items() if "factors" in entry}
    assert len(scaled) > 5 and all(found[name].ndim > 1 for name in scaled)


def test_submodel_onnx_file_report_and_evaluate_agree(fleet: Fleet, made: Made) -> None:
    after = made.report["evaluation"]["after"]
    for network in (made.folder, made.folder / "model.onnx"):
        said = run_well("evaluate", network, "--data", "digits@test", "--no-latency", "--threads", 1, "--json").json
        assert said["accuracy"] == after["accuracy"]
        assert said["loss"] == pytest.approx(after["loss"], rel=1e-5)
    assert made.report["onnx"]["parity"] < 1e-4
    assert after["loss"] < made.report["evaluation"]["before"]["loss"] + 0.5


def test_the_divergence_in_the_report_is_that_of_the_files(fleet: Fleet, made: Made) -> None:
    data = load_data("digits@train")
    fitted, others = subset(data, SAMPLES, 0), split(data, SAMPLES, SAMPLES // 4, 0)[1]
    assert not {sample.tobytes() for sample in fitted.x} & {sample.tobytes() for sample in others.x}
    for name, dataset in {"fitted": fitted, "final": others}.items():
        samples = torch.from_numpy(dataset.x)
        with torch.no_grad():
            models = (open_network(path, warn=print).model for path in (fleet.checkpoint, made.folder))
            p, q = (model(samples).double().log_softmax(1) for model in models)
        expected = float((p.exp() * (p - q)).sum(1).mean())
        assert made.report["divergence"][name] == pytest.approx(expected, rel=1e-4)


def test_an_untouched_submodel_leads_back_to_the_global_checkpoint_byte_for_byte(
    fleet: Fleet, made: Made, tmp_path: Path
) -> None:
    merge = ("reconstruct", fleet.checkpoint, made.folder)
    expected = load_file(fleet.checkpoint)
    run_well(*merge, "-o", tmp_path / "alone.safetensors")
    assert same_bits(load_file(tmp_path / "alone.safetensors"), expected)
    run_well(*merge, fleet.submodels["raspberry-pi-4"], "--rule", "covered", "-o", tmp_path / "both.safetensors")
    assert same_bits(load_file(tmp_path / "both.safetensors"), expected)
    run_well(*merge, "--keep-compensation", "-o", tmp_path / "kept.safetensors")
    kept = load_file(tmp_path / "kept.safetensors")
    changed = {name for name in expected if not np.array_equal(kept[name], expected[name])}
    assert changed == {name for name, entry in made.table.items() if "factors" in entry}


def test_the_same_inputs_give_the_same_bytes(fleet: Fleet, made: Made, tmp_path: Path) -> None:
    for file in (fleet.checkpoint, fleet.scores):
        shutil.copy(file, tmp_path)
    inputs = ("global.safetensors", "--scores", "scores.safetensors", *CALIBRATED, "--data", "digits@test")
    start_well("prune", *inputs, "--no-onnx", "-o", "again", "--quiet", cwd=tmp_path)
    for name in ("submodel.safetensors", "index_map.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (made.folder / name).read_bytes(), name
    again = Made(tmp_path / "again", made.said).report
    assert again == {key: value for key, value in made.report.items() if key != "onnx"}


def test_without_compensation_the_index_map_has_no_factors(fleet: Fleet, tmp_path: Path) -> None:
    plain = prune(fleet, tmp_path / "plain", *CALIBRATED, "--no-compensate", "--no-onnx")
    assert not any("factors" in entry for entry in plain.table.values())
    assert all(name.startswith("index.") for name in load_file(plain.folder / "index_map.safetensors"))
    assert same_bits(load_file(plain.folder / "submodel.safetensors"), gathered(fleet, plain))
    assert plain.report["selection"]["compensate"] is False
    assert "compensation" not in plain.report
    assert plain.report["divergence"].keys() == DIVERGENCE


def test_labels_as_reference_and_norms_measured_anew(fleet: Fleet, tmp_path: Path) -> None:
    other = prune(fleet, tmp_path / "other", *CALIBRATED, "--reference", "labels", "--recalibrate", "--no-onnx")
    assert other.report["selection"]["reference"] == "labels" and other.report["selection"]["recalibrate"] is True
    found, cut = load_file(other.folder / "submodel.safetensors"), gathered(fleet, other)
    changed = {name.rpartition(".")[2] for name in cut if not np.array_equal(found[name], cut[name])}
    assert changed == {"running_mean", "running_var"}
    assert all(found[name].dtype == cut[name].dtype and np.isfinite(found[name]).all() for name in cut)


def test_interactions_of_the_scores_file_select_without_samples(fleet: Fleet, tmp_path: Path) -> None:
    said = prune(fleet, tmp_path / "no", "--selection", "quadratic", "--macs", "0.6", "--dry-run").said.json
    (report,) = said["submodels"]
    interactions = load_file(fleet.scores)["interactions"].astype(np.float64)
    gone = ~np.isin(np.arange(interactions.shape[1]), report["kept_groups"])
    removed = interactions[:, gone].sum(1)
    expected = dict.fromkeys(DIVERGENCE) | {"predicted": pytest.approx(removed @ removed / 2, rel=1e-3), "held_out": 0}
    assert report["divergence"] == expected
    assert report["selection"] == {"selection": "quadratic"} and "compensation" not in report
    assert not (tmp_path / "no").exists()


def test_scores_are_not_needed_with_calibration_and_have_no_influence_which_is_said(
    fleet: Fleet, made: Made, tmp_path: Path
) -> None:
    said = run_well("prune", fleet.checkpoint, *CALIBRATED, "--no-onnx", "--json", "-o", tmp_path / "without")
    alone = Made(tmp_path / "without", said).report
    assert alone["kept_groups"] == made.report["kept_groups"] and alone["divergence"] == made.report["divergence"]
    assert "significance_removed" not in alone and made.report["significance_removed"] > 0
    assert len(alone["provenance"]["inputs"]) == len(made.report["provenance"]["inputs"]) - 1
    assert "--scores (gate-ggn) have no influence" in made.said.stderr and "influence" not in said.stderr


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(done: Done, code: int, *parts: str) -> None:
    assert done.code == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) <= 3
    assert all(part in done.stderr for part in parts), done.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--selection", "linear"], ["--selection linear", "--calibration SPEC"]),
        (["--recalibrate"], ["--recalibrate needs --calibration SPEC"]),
        (["--reference", "labels"], ["--reference labels needs --calibration SPEC"]),
        (["--reference", "teacher"], ["--reference 'teacher'", "network or labels"]),
        (["--selection", "best"], ["--selection 'best'", "linear, quadratic, independent"]),
    ],
)
def test_options_that_lack_what_they_need_are_slips_of_usage(
    fleet: Fleet, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    out = tmp_path / "out"
    inputs = (fleet.checkpoint, "--scores", fleet.scores, "--macs", "0.6", "-o", out)
    refused(run("prune", *inputs, *arguments), 2, *parts)
    assert not out.exists()


@pytest.mark.parametrize("arguments", [[], ["--calibration", "digits@train", "--selection", "independent"]])
def test_selection_goes_by_scores_or_by_samples(fleet: Fleet, tmp_path: Path, arguments: list[str]) -> None:
    done = run("prune", fleet.checkpoint, "--macs", "0.6", *arguments, "-o", tmp_path / "out")
    refused(done, 2, "--scores FILE", "--calibration SPEC")


def test_classes_and_draws_exclude_each_other(fleet: Fleet, tmp_path: Path) -> None:
    done = run("score", fleet.checkpoint, "--top", 2, "--draws", 1, "-o", tmp_path / "scores.safetensors")
    refused(done, 2, "--top and --draws exclude each other")
    assert not list(tmp_path.iterdir())


def test_the_quadratic_form_needs_interactions(fleet: Fleet, without_interactions: Path, tmp_path: Path) -> None:
    inputs = (fleet.checkpoint, "--scores", without_interactions, "--macs", "0.6", "-o", tmp_path / "out")
    refused(run("prune", *inputs, "--selection", "quadratic"), 3, str(without_interactions), "--calibration SPEC")
    assert not (tmp_path / "out").exists()


DAMAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one group too few": lambda interactions: interactions[:, 1:].copy(),
    "one axis": lambda interactions: interactions[0].copy(),
    "float64": lambda interactions: interactions.astype(np.float64),
    "NaN": lambda interactions: np.where(np.arange(len(interactions))[:, None] == 3, np.float32(np.nan), interactions),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_interactions_are_refused(fleet: Fleet, tmp_path: Path, how: str) -> None:
    arrays = load_file(fleet.scores)
    with safe_open(fleet.scores, "numpy") as file:
        metadata = file.metadata()
    bad = tmp_path / "bad.safetensors"
    save_file(arrays | {"interactions": DAMAGES[how](arrays["interactions"])}, bad, metadata)
    done = run("prune", fleet.checkpoint, "--scores", bad, "--macs", "0.6", "-o", tmp_path / "out")
    refused(done, 3, "bad.safetensors", "interactions", "cahfp score")
    assert not (tmp_path / "out").exists()
