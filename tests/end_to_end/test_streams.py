"""Who says what where: results on standard output, everything else on standard error."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.commands import COMMAND, environment, run, run_well
from tests.support.fleet import SHARES, Clients, Fleet


@pytest.mark.parametrize("command", ["train", "score", "prune", "client", "reconstruct"])
def test_json_is_one_object_on_stdout_and_nothing_else(fleet: Fleet, clients: Clients, command: str) -> None:
    said = {**fleet.said, "client": clients.said["stm32h743"], "reconstruct": clients.said["reconstruct"]}[command]
    value, end = json.JSONDecoder().raw_decode(said.stdout)
    assert isinstance(value, dict)
    assert said.stdout[end:] == "\n"


def test_progress_of_training_goes_to_stderr(fleet: Fleet, clients: Clients) -> None:
    lines = fleet.said["train"].stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert clients.said["stm32h743"].stderr.startswith("epoch 1/1: loss ")


def test_nothing_to_remark_leaves_stderr_empty(fleet: Fleet, clients: Clients) -> None:
    for done in (fleet.said["score"], fleet.said["prune"], clients.said["reconstruct"]):
        assert done.stderr == ""


def test_in_a_pipe_there_are_no_escape_codes_and_no_bars(fleet: Fleet, clients: Clients) -> None:
    for done in (*fleet.said.values(), *clients.said.values()):
        assert not {"\x1b", "\r", "\b"} & set(done.stdout + done.stderr)


def test_json_says_what_was_written_and_how_well_it_did(fleet: Fleet, clients: Clients) -> None:
    trained = fleet.said["train"].json
    assert trained["output"] == "global.safetensors"
    assert trained["test"]["samples"] == 355 and 0.3 < trained["test"]["accuracy"] <= 1
    scored = fleet.said["score"].json
    assert scored["samples"] == 64 and scored["criterion"] == "gate-ggn"
    assert scored["significance"]["min"] <= scored["significance"]["median"] <= scored["significance"]["max"]
    pruned = fleet.said["prune"].json
    assert pruned["written"] is True and len(pruned["submodels"]) == 3
    merged = clients.said["reconstruct"].json
    assert merged["written"] is True and len(merged["clients"]) == len(SHARES)


def test_dry_run_shows_the_plan_and_writes_nothing(fleet: Fleet, tmp_path) -> None:
    done = run_well(
        *("prune", fleet.checkpoint, "--scores", fleet.scores, "--profile", "pi4", "--keep", "0.5", "--dry-run"),
        *("--json", "-o", tmp_path / "planned"),
    )
    (plan,) = done.json["submodels"]
    assert done.json["written"] is False
    assert plan["groups"]["kept"] == plan["groups"]["of"] // 2
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_early_gets_no_complaint(fleet: Fleet) -> None:
    with subprocess.Popen(
        [str(COMMAND), "inspect", str(fleet.checkpoint)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_reader_that_leaves_early_does_not_end_the_work(tmp_path: Path) -> None:
    steps = ("--epochs", "3", "--threads", "1", "--data", "digits@train[:64]", "--model", "vgg11", "--model-arg")
    command = [str(COMMAND), "train", *steps, "width=0.0625", "-o", str(tmp_path / "g.safetensors")]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=closed, env=environment(), check=False)
    assert done.returncode == 0
    assert (tmp_path / "g.safetensors").is_file()


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("arguments", "code"), [("profile list", 0), ("--help", 0), ("profile list --bogus", 2), ("inspect missing", 3)]
)
def test_streams_closed_from_the_start_change_no_exit_code(redirection: str, arguments: str, code: int) -> None:
    command = ["sh", "-c", f'"$0" {arguments} {redirection}', str(COMMAND)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "defect" not in done.stderr


def test_a_file_gets_only_its_own_bytes_where_streams_are_closed(fleet: Fleet, tmp_path: Path) -> None:
    for name, redirection in (("open", ""), ("closed", "<&- >&- 2>&-")):
        command = f'"$0" score "$1" --criterion l2 --seed 0 -o "$2" {redirection}'
        arguments = [str(COMMAND), str(fleet.checkpoint), str(tmp_path / name)]
        assert subprocess.run(["sh", "-c", command, *arguments], env=environment(), check=False).returncode == 0
    assert (tmp_path / "open").read_bytes() == (tmp_path / "closed").read_bytes()


def test_a_full_disk_behind_standard_output_is_said() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [str(COMMAND), "profile", "list"], stdout=full, stderr=subprocess.PIPE, env=environment(), check=False
        )
    assert done.returncode == 3
    assert done.stderr == b"error: input/output: No space left on device\n"


def test_a_name_that_is_no_text_can_be_shown(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.json"
    Path(os.fsdecode(path)).write_text("{")
    for more in ([], ["--json"]):
        command = [str(COMMAND).encode(), b"inspect", path, *map(str.encode, more)]
        for env in ({}, {"LC_ALL": "C"}):
            done = subprocess.run(command, capture_output=True, env=environment(env), check=False)
            assert done.returncode == 3, done.stderr
            assert b"ff.json" in done.stderr


def test_errors_are_plain_text_and_debugging_shows_the_traceback(tmp_path) -> None:
    missing = tmp_path / "missing.safetensors"
    plain = run("inspect", missing, "--json")
    assert (plain.code, plain.stdout) == (3, "")
    assert plain.stderr.startswith("error: ") and str(missing) in plain.stderr
    assert "Traceback" in run("inspect", missing, env={"CAHFP_DEBUG": "1"}).stderr
