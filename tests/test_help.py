"""Help and usage errors of every command; `scripts/test_lowest.sh` runs this with the oldest typer too."""

import re

import pytest

from tests.conftest import run_here

COMMANDS = (
    *("train", "score", "prune", "evaluate", "reconstruct", "inspect", "simulate"),
    *("profile list", "profile show", "profile predict", "profile measure"),
)
ARGUMENTS = {
    "train": "Where to start; without it, from scratch",
    "score": "Our checkpoint, or someone else's.",
    "prune": "Our checkpoint, or someone else's.",
    "evaluate": "What to evaluate.",
    "reconstruct": "One folder for each client, or partial aggregates.",
    "profile show": "Name or alias of a profile, or a path to a .toml file.",
    "profile predict": "A checkpoint, a submodel folder or an ONNX file in one",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_neither_escapes_nor_a_traceback(command: str) -> None:
    shown = run_here(*command.split(), "--help")
    assert (shown.code, shown.stderr) == (0, "")
    assert "\\[" not in shown.stdout
    assert "Show this message and exit." in shown.stdout


@pytest.mark.parametrize("command", ARGUMENTS)
def test_help_explains_each_argument_once(command: str) -> None:
    text = re.sub(r"\s+", " ", run_here(*command.split(), "--help").stdout)
    assert text.count(ARGUMENTS[command]) == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("score", "CHECKPOINT"),
        ("score g.safetensors", "--output"),
        ("train -o", "requires an argument"),
        ("train -o x --epochs 0", "--epochs"),
        ("train -o x --lr much", "--lr"),
        ("train -o x --bogus", "--bogus"),
        ("nonsense", "nonsense"),
        ("profile nonsense", "nonsense"),
        ("inspect a b", "b"),
    ],
)
def test_a_slip_on_the_command_line_is_a_usage_error_that_names_it(arguments: str, word: str) -> None:
    done = run_here(*arguments.split())
    assert done.code == 2
    assert word.lower() in done.stderr.lower()
    assert done.stdout == ""
    assert "defect" not in done.stderr
