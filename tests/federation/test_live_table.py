"""What `cahfp simulate` shows while it runs: a table on a terminal, notes on a pipe, nothing with --quiet or --json."""

import os
import pty
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cahfp_cli.commands.live import Runs, cells, live_table, warn
from cahfp_cli.output import Console
from tests.support.commands import COMMAND, environment, run_well
from tests.support.experiments import write_toml

HEADS = ("partition", "round", "deployed, %", "up, MB", "seconds")


def on_terminal(*arguments: object) -> tuple[str, str]:
    """Standard output in a pipe, and what standard error, a terminal of 120 columns, got without control codes."""
    ours, theirs = pty.openpty()
    env = environment({"TERM": "xterm", "COLUMNS": "120", "LINES": "40"})
    command = [str(COMMAND), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=env) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                got = os.read(ours, 1 << 16)
            except OSError:  # on Linux the end of a terminal whose other side is closed
                break
            if not got:
                break
            seen += got
        assert process.stdout is not None
        said = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0, seen.decode()
    return said, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())


def test_a_terminal_gets_a_row_a_run_that_follows_its_rounds(tmp_path: Path) -> None:
    said, shown = on_terminal("simulate", write_toml(tmp_path / "e.toml"), "-o", tmp_path / "out", "--threads", "1")
    assert all(head in shown for head in HEADS)
    for method in ("heterofl", "cahfp"):
        for number in (1, 2):
            assert re.search(rf"dirichlet\(0\.5\) +{method} +0 +{number}/2 +\d", shown), shown
    assert re.search(r"cahfp +0 +2/2 +\d\.\d{3} +\d+\.\d +\d+\.\d +\d\.\d +\d", shown)
    assert "seed 0, round" not in shown and said.startswith("dirichlet(0.5)\nmethod")


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_quiet_and_json_say_nothing_on_a_terminal_that_they_do_not_in_a_pipe(option: str, tmp_path: Path) -> None:
    toml = write_toml(tmp_path / "e.toml")
    _, shown = on_terminal("simulate", toml, "-o", tmp_path / "out", "--threads", "1", option)
    piped = run_well("simulate", toml, "-o", tmp_path / "piped", "--threads", "1", option).stderr
    assert "deployed, %" not in shown and shown.replace("\r\n", "\n") == piped
    assert not piped if option == "--quiet" else piped.count("round 2/2") == 2


def row(number: int, **more: Any) -> dict[str, Any]:
    sound = {"dropped": {}, "unscored": {}, "failed": None, "loss": 1.0, "uploaded_bytes": 2e6, "seconds": 1.0}
    return {"round": number, **sound, **more}


def test_accuracies_stay_until_the_next_evaluation_and_a_failed_round_is_named() -> None:
    first = cells(row(1, accuracy={"recalibrated": 0.5, "deployed": 0.25}), 3, 1.0, None)
    assert first == ["1/3", "1.000", "50.0", "25.0", "2.0", "1"]
    assert cells(row(2, loss=None, failed="why"), 3, 2.0, first) == ["2/3", "failed", "50.0", "25.0", "2.0", "2"]
    assert cells(row(1), 3, 1.0, None)[2:4] == ["", ""]
    nothing = row(1, accuracy={"recalibrated": 0.5, "deployed": None, "missing": {"deployed": "client 1: why"}})
    assert cells(nothing, 3, 1.0, None)[2:4] == ["50.0", "-"]


def test_warnings_name_who_was_dropped_and_why_a_round_failed(capsys: pytest.CaptureFixture[str]) -> None:
    warn(
        Console(quiet=True),
        "iid",
        "cahfp",
        0,
        row(2, dropped={"3": "no reply"}, unscored={"4": "too wide"}, failed="lost"),
    )
    assert capsys.readouterr().err.splitlines() == [
        "warning: iid, cahfp, seed 0, round 2: client 3 dropped: no reply",
        "warning: iid, cahfp, seed 0, round 2: client 4 keeps its mask: too wide",
        "warning: iid, cahfp, seed 0, round 2: the global checkpoint stays as it was: lost",
    ]


def test_a_low_terminal_shows_the_runs_that_moved_last() -> None:
    runs: Runs = {("iid", f"m[{number}]", 0): cells(row(1), 3, 1.0, None) for number in range(9)}
    methods = [str(cell) for cell in live_table(runs, 4).columns[1].cells]
    assert methods == ["m[5]", "m[6]", "m[7]", "m[8]"]
