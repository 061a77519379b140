"""`cahfp profile measure` as a user runs it, and the file that it writes."""

import json
from pathlib import Path

import numpy as np
import pytest

from cahfp_cli.device.calibration import Fit
from cahfp_cli.device.latency import rates_of
from cahfp_cli.device.measurement import Measured, profile_content, profile_toml
from cahfp_cli.device.profile import DeviceProfile, read_profile
from tests.device.test_latency import LINKS, made_up
from tests.support.commands import run, run_well
from tests.support.fleet import Fleet


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measured") / "here.toml"
    done = run_well("profile", "measure", "-o", path, "--uplink", 5, "--json")
    said = json.loads(done.stdout)
    assert len(said["residuals"]) > 50
    assert float(np.median(np.abs(list(said["residuals"].values())))) < 0.25  # a sane fit even on a busy machine
    return path


def test_a_measured_profile_is_a_profile_like_any_other(measured: Path) -> None:
    profile = read_profile(measured)
    assert profile.name == "here"
    assert profile.calibration is not None and profile.alignment is not None
    assert profile.links.uplink.si == pytest.approx(5e6 / 8)
    assert profile.runtime.threads == 1
    assert measured.read_text().startswith("# Fit over ")
    assert "calibration.conv.rate" in run_well("profile", "show", measured).stdout


def test_prune_verify_holds_a_latency_on_this_machine(measured: Path, fleet: Fleet, tmp_path: Path) -> None:
    predicted = json.loads(run_well("profile", "predict", fleet.checkpoint, "--profile", measured, "--json").stdout)[
        "latency_seconds"
    ]
    limit = f"{predicted * 1e6 * 3:.1f}us"  # met by the whole network, whatever else the machine does
    arguments = (fleet.checkpoint, "--scores", fleet.scores, "--profile", measured, "--latency", limit)
    run_well("prune", *arguments, "--verify", "-o", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "here" / "report.json").read_text())
    assert report["measured"]["latency_seconds"] <= 3 * predicted * 1.001
    assert report["measured"]["tries"] >= 1
    assert report["budget"]["limits"]["latency"] == pytest.approx(3 * predicted, rel=1e-2)


def test_predict_measures_a_checkpoint_and_an_onnx_file_beside_its_submodel(
    measured: Path, fleet: Fleet, tmp_path: Path
) -> None:
    def said(*arguments: object) -> dict[str, float]:
        found: dict[str, float] = json.loads(run_well("profile", "predict", *arguments, "--json").stdout)
        return found

    whole = said(fleet.checkpoint, "--profile", measured, "--measure")
    assert 0.1 < whole["latency_seconds"] / whole["measured_seconds"] < 10  # whatever else the machine does
    assert "measured_seconds" not in said(fleet.checkpoint, "--profile", measured)
    limits = ("--scores", fleet.scores, "--profile", measured, "--macs", 0.7)
    run_well("prune", fleet.checkpoint, *limits, "-o", tmp_path / "out")
    folder = tmp_path / "out" / "here"
    of_file = said(folder / "model.onnx", "--profile", measured, "--measure")
    assert of_file["latency_seconds"] == said(folder, "--profile", measured)["latency_seconds"]
    assert of_file["macs"] < 0.71 * whole["macs"]
    assert of_file["measured_seconds"] > 0
    (tmp_path / "alone.onnx").write_bytes((folder / "model.onnx").read_bytes())
    alone = run("profile", "predict", tmp_path / "alone.onnx", "--profile", measured)
    assert (alone.code, "submodel.safetensors" in alone.stderr) == (2, True)


def test_budgets_hold_for_the_spread_of_the_fit(measured: Path, fleet: Fleet, tmp_path: Path) -> None:
    profile = read_profile(measured)
    assert profile.calibration is not None and profile.calibration.spread is not None
    slow = 1 + 1.645 * profile.calibration.spread.si
    predicted = json.loads(run_well("profile", "predict", fleet.checkpoint, "--profile", measured, "--json").stdout)[
        "latency_seconds"
    ]
    for share, whole in ((1.001, True), (0.999, False)):
        arguments = (
            "--scores",
            fleet.scores,
            "--profile",
            measured,
            "--latency",
            f"{predicted * slow * share * 1e6}us",
        )
        out = tmp_path / str(share)
        run_well("prune", fleet.checkpoint, *arguments, "-o", out)
        found = json.loads((out / "here" / "report.json").read_text())["predicted"]["latency_seconds"]
        assert (found == pytest.approx(predicted, rel=1e-9)) == whole


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("-o", "here.txt"), 2, "ends in .toml"),
        (("-o", "My Board.toml"), 2, "pass --name"),
        (("-o", "x.toml", "--threads", 0), 2, "threads"),
        (("-o", "missing/x.toml"), 3, "missing"),
    ],
)
def test_a_slip_is_answered_before_anything_is_measured(
    arguments: tuple[object, ...], code: int, message: str, tmp_path: Path
) -> None:
    done = run("profile", "measure", *arguments, cwd=tmp_path)
    assert done.code == code
    assert message in done.stderr


def test_an_existing_profile_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("kept")
    done = run("profile", "measure", "-o", tmp_path / "mine.toml")
    assert done.code == 3 and "--force" in done.stderr
    assert (tmp_path / "mine.toml").read_text() == "kept"


@pytest.mark.parametrize("seed", range(4))
def test_a_file_gives_back_the_profile_and_its_rates(seed: int, tmp_path: Path) -> None:
    rates = made_up(seed, 4e6)
    found = Fit(rates, 16, 4, np.array([0.1, -0.2]))
    profile = DeviceProfile.model_validate(profile_content("some-board", 2, LINKS, found, 3.3333e9))
    path = tmp_path / "some-board.toml"
    path.write_text(profile_toml(Measured(profile, found, ("a", 'b "quoted"'), np.array([1.0, 2.0]))))
    assert read_profile(path) == profile
    back = rates_of(read_profile(path))
    names = (
        "operation",
        "byte",
        "overhead",
        "line",
        "load",
        "wait",
        "reorder",
        "reorder_call",
        "weight",
        "once",
        "streaming",
        "cache",
        "call",
    )
    for name in names:
        np.testing.assert_allclose(getattr(back, name), getattr(rates, name), rtol=1e-3, err_msg=name)
