"""`cahfp simulate` end to end."""

import json
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.commands import COMMAND, environment, run, run_well
from tests.support.experiments import TOML, write_toml


def test_the_command_writes_metrics_a_summary_figures_and_one_report(tmp_path: Path) -> None:
    toml, output = write_toml(tmp_path / "e.toml"), tmp_path / "out"
    said = run_well("simulate", toml, "-o", output, "--json", "--threads", "1").json
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(line["method"], line["round"]) for line in lines] == [
        (m, r) for m in ("heterofl", "cahfp") for r in (1, 2)
    ]
    summary = json.loads((output / "summary.json").read_text())
    assert said["results"] == summary["results"]
    for entry in summary["results"]:
        assert 0 <= entry["deployed"]["mean"] <= 1 and len(entry["by_device"]) == 4
    report = (output / "report.html").read_text()
    assert report.count("<img") == len(list(output.glob("*.png"))) == 8 and "heterofl" in report
    assert not re.search(r"""(src|href)=["'](?!data:)""", report)
    again = run("simulate", toml, "-o", output)
    assert again.code == 3 and "--resume" in again.stderr
    assert run_well("simulate", toml, "-o", output, "--resume", "--json", "--threads", "1").json == said
    write_toml(toml, TOML.replace("rounds = 2", "rounds = 3"))
    assert run("simulate", toml, "-o", output, "--resume").code == 3


@pytest.mark.slow
def test_a_command_killed_in_the_middle_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    toml = write_toml(tmp_path / "e.toml", TOML.replace("rounds = 2", "rounds = 6").replace('"heterofl", ', ""))
    run_well("simulate", toml, "-o", tmp_path / "whole", "--threads", "1")
    output = tmp_path / "killed"
    arguments = ["simulate", str(toml), "-o", str(output), "--threads", "1"]
    process = subprocess.Popen([str(COMMAND), *arguments], env=environment(), stderr=subprocess.DEVNULL)
    state = output / "runs" / "dirichlet-0.5" / "cahfp" / "seed0" / "state.json"
    while process.poll() is None and not state.exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (output / "summary.json").exists()
    run_well(*arguments, "--resume")
    whole, killed = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
        for folder in (tmp_path / "whole", output)
    )
    assert whole == killed and not list(output.rglob(".*"))


def test_runs_in_parallel_give_the_bytes_and_figures_of_runs_one_after_the_other(tmp_path: Path) -> None:
    toml = write_toml(tmp_path / "e.toml")
    said = [
        run_well("simulate", toml, "-o", tmp_path / f"jobs{jobs}", "--threads", 1, "--jobs", jobs, "--json").json
        for jobs in (1, 2)
    ]
    one, two = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
        for folder in (tmp_path / "jobs1", tmp_path / "jobs2")
    )
    assert one == two and len(one) > 4
    without_seconds = [[{**entry, "seconds": 0} for entry in each["results"]] for each in said]
    assert without_seconds[0] == without_seconds[1]
    write_toml(toml, TOML.replace('"heterofl"', '"fedavg-strong"').replace("keep = 1.0", "keep = 0.5"))
    failed = run("simulate", toml, "-o", tmp_path / "none", "--jobs", 2)
    assert failed.code == 3 and "0 devices of the fleet hold the whole network" in failed.stderr
    assert run("simulate", toml, "-o", tmp_path / "x", "--jobs", 2, "--backend", "flower").code == 2


def test_a_simulation_that_trained_nothing_says_so_everywhere_and_fails(tmp_path: Path) -> None:
    toml, output = write_toml(tmp_path / "e.toml", TOML + "\n[train]\nlr = 1e29\n"), tmp_path / "out"
    done = run("simulate", toml, "-o", output, "--threads", "1", "--json")
    assert done.code == 3 and "nothing was trained in any run: no round was merged" in done.stderr
    for entry in json.loads(done.stdout)["results"]:
        assert entry["deployed"] is None and set(entry["by_device"]) == {None} and entry["failed"] == 2
        assert "no round was merged" in entry["missing"]["recalibrated"]
    report = (output / "report.html").read_text()
    assert "cahfp: tuned is missing: seed 0: no round was merged" in report and "0.0 ±" not in report
    again = run("simulate", toml, "-o", output, "--resume", "--threads", "1")
    assert again.code == 3 and "heterofl: global is missing" in again.stdout and "warning" not in again.stderr.lower()


def test_natural_users_come_by_column(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, y = random.random((80, 1, 8, 8), np.float32), np.arange(80) % 2
    archive = {"x_train": x, "y_train": y, "x_test": x[:20], "y_test": y[:20]}
    np.savez(tmp_path / "users.npz", user=random.permutation(np.repeat(["a", "b", "c", "d"], 20)), **archive)
    text = TOML.replace("digits@train[0:300]", f"npz:{tmp_path}/users.npz@train")
    text = text.replace("digits@test[0:100]", f"npz:{tmp_path}/users.npz@test").replace(
        "dirichlet(0.5)", "by-column(user)"
    )
    path = write_toml(tmp_path / "e.toml", text.replace('"heterofl", ', ""))
    assert len(run_well("simulate", path, "-o", tmp_path / "out", "--json").json["results"]) == 1


def test_errors_have_their_exit_codes(tmp_path: Path) -> None:
    assert run("simulate", tmp_path / "none.toml", "-o", tmp_path / "out").code == 3
    broken = write_toml(tmp_path / "e.toml", TOML.replace("rounds", "roundz"))
    done = run("simulate", broken, "-o", tmp_path / "out")
    assert done.code == 3 and "did you mean 'rounds'" in done.stderr and not (tmp_path / "out").exists()
