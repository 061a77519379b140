"""`cahfp --log FILE`: what is said on standard error is also kept, with time and level."""

import re
import warnings
from pathlib import Path

import pytest

from cahfp_cli.commands import profile
from tests.support.commands import Done, run, run_here

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d (INFO   |WARNING|ERROR  ) (.*)")


def lines_of(path: Path) -> list[tuple[str, str]]:
    """Level and text of each line; all lines must be lines of a log."""
    found = [LINE.fullmatch(line) for line in path.read_text().splitlines()]
    assert all(found)
    return [(match[1].strip(), match[2]) for match in found if match is not None]


def test_notes_and_warnings_of_a_command_are_kept_and_runs_follow_one_another(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    steps = ("--model", "vgg11", "--model-arg", "width=0.0625", "--data", "digits@train[:64]", "--threads", "1")
    for name in ("a", "b"):
        done = run("--log", log, "train", *steps, "--epochs", "1", "-o", tmp_path / f"{name}.safetensors")
        assert done.code == 0, done.stderr
    said = [text for level, text in lines_of(log) if level == "INFO"]
    assert len(said) == 4 and said[0].startswith("cahfp ") and "train --model vgg11" in said[0]
    assert said[1] in done.stderr and said[1].startswith("epoch 1/1: loss")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("nonsense", 2, "nonsense"),
        ("profile nonsense", 2, "nonsense"),
        ("inspect a b", 2, "b"),
        ("train -o x --epochs 0", 2, "--epochs"),
        ("profile show stm32h74", 2, "error: unknown profile"),
        ("inspect none", 3, "error: none: no such file"),
    ],
)
def test_errors_of_every_kind_are_kept(
    arguments: str, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here("--log", "run.log", *arguments.split())
    assert done.code == code
    level, text = lines_of(tmp_path / "run.log")[-1]
    assert level == "ERROR" and words in text
    assert text.removeprefix("error: ") in done.stderr


def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Done:
    """`profile list` with a defect, after a library's warning."""

    def defect(*_: object) -> None:
        warnings.warn("this is going away", UserWarning, stacklevel=1)
        raise ZeroDivisionError("no such luck")

    monkeypatch.setattr(profile, "table", defect)
    return run_here("--log", tmp_path / "run.log", "profile", "list")


def test_a_defect_leaves_its_traceback_in_the_log_and_one_line_on_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match="going away"):  # shown as ever
        done = failing(tmp_path, monkeypatch)
    lines = lines_of(tmp_path / "run.log")
    texts = [text for _, text in lines]
    assert done.code == 1 and "Traceback" not in done.stderr
    assert ("WARNING", "UserWarning: this is going away") in lines
    assert "Traceback (most recent call last):" in texts and "ZeroDivisionError: no such luck" in texts
    assert texts[-2].startswith("error: internal error: ZeroDivisionError")


@pytest.mark.parametrize("name", ["", "none/run.log"])
def test_a_log_that_cannot_be_written_is_a_usage_error(name: str, tmp_path: Path) -> None:
    done = run_here("--log", tmp_path / name, "profile", "list")
    assert (done.code, done.stdout) == (2, "")
    assert "--log" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_full_disk_ends_the_log_and_not_the_work() -> None:
    done = run("--log", "/dev/full", "profile", "list")
    assert done.code == 0 and "stm32h743" in done.stdout
    assert done.stderr == "warning: /dev/full: No space left on device; the log ends here\n"


def test_without_a_log_and_for_completion_no_file_is_made(tmp_path: Path) -> None:
    asked = {"_CAHFP_COMPLETE": "complete_bash", "COMP_WORDS": "cahfp --log run.log re", "COMP_CWORD": "3"}
    assert run(cwd=tmp_path, env=asked).stdout.split() == ["reconstruct"]
    assert run("--log", "run.log", "--help", cwd=tmp_path).code == 0
    assert not list(tmp_path.iterdir())
