"""Help and usage errors of every command; `scripts/test_lowest.sh` runs this with the oldest typer too."""

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cahfp_cli.app import app
from cahfp_cli.commands import options
from cahfp_cli.commands.guides import EXIT_CODES, GUIDES
from cahfp_cli.commands.helping import Entry, entries
from tests.support.commands import run, run_here
from tests.support.fleet import Clients, Fleet

ROOT = Path(__file__).parents[1]

COMMANDS = (
    *("train", "score", "prune", "evaluate", "reconstruct", "inspect", "simulate", "doctor"),
    *("profile list", "profile show", "profile predict", "profile measure"),
)
ARGUMENTS = {
    "train": "Where to start; without it, from scratch",
    "score": "Trained network: a checkpoint of cahfp, or someone else's with --model.",
    "prune": "Trained network: a checkpoint of cahfp, or someone else's with --model.",
    "evaluate": "What to evaluate: a checkpoint, a submodel folder or an ONNX file.",
    "reconstruct": "One folder for each client, or partial aggregates.",
    "profile show": "Name or alias of a profile, or a path to a .toml file.",
    "profile predict": "A checkpoint, a submodel folder or an ONNX file in one",
}


SLOW = {"train", "prune", "score", "simulate", "profile measure"}


def context_of(command: str) -> Any:
    """The context of a command with nothing parsed, as for completion."""
    context = None
    group: Any = typer.main.get_command(app)
    for name in ("cahfp", *command.split()):
        group = group if context is None else group.commands[name]
        context = group.make_context(name, [], parent=context, resilient_parsing=True)
    return context


def shown(command: str) -> list[Entry]:
    context = context_of(command)
    return entries(context.command.get_params(context))


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


@pytest.mark.parametrize("command", ("", "profile", *COMMANDS))
def test_short_and_long_help_are_the_same(command: str) -> None:
    assert run_here(*command.split(), "-h") == run_here(*command.split(), "--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_stands_in_a_group_with_what_it_takes_and_what_it_does(command: str) -> None:
    context = context_of(command)
    for parameter in context.command.get_params(context):
        if parameter.name == "help":
            continue
        assert parameter.help, parameter.name
        assert parameter.param_type_name == "argument" or parameter.rich_help_panel in options.PANELS, parameter.name
        is_flag = getattr(parameter, "is_flag", False)
        assert is_flag or re.fullmatch(r"[A-Z]\S*|[a-z0-9]+(\|[a-z0-9]+)+", parameter.metavar), parameter.name
    text = run_here(*command.split(), "--help").stdout
    panels = list(dict.fromkeys(entry.panel for entry in shown(command)))
    headings = re.findall(r"^(\w[\w ]*):$", text, flags=re.M)
    assert headings == [*panels, "Examples"]
    assert max(map(len, text.splitlines())) <= 80


def test_the_same_option_stands_in_the_same_group_in_every_command() -> None:
    panels: dict[str, set[str]] = {}
    for command in COMMANDS:
        for entry in shown(command):
            if entry.panel != "Arguments":
                panels.setdefault(re.split(r"[ ,]", entry.names.removeprefix("-o, "))[0], set()).add(entry.panel)
    differing = {name for name, found in panels.items() if len(found) > 1}
    assert differing == {"--profile", "--latency"}  # `profile predict` asks for a device, `evaluate` whether to time


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_examples_that_parse_and_a_page_that_exists(command: str) -> None:
    guide = GUIDES[command]
    text = run_here(*command.split(), "--help").stdout
    assert text.endswith(f"Learn more: {guide.page}\n")
    assert (ROOT / guide.page).is_file()
    assert len(guide.examples) == 2
    for example in guide.examples:
        words = words_of(example)
        assert words[: 1 + len(command.split())] == ["cahfp", *command.split()]
        assert all(line in text for line in example.splitlines())
        group = context_of(" ".join(command.split()[:-1]))
        context = group.command.commands[command.split()[-1]].make_context(
            command.split()[-1], words[1 + len(command.split()) :], parent=group
        )
        assert not context.args


def words_of(example: str) -> list[str]:
    return shlex.split(example.replace("\\\n", ""))


def test_every_command_has_a_guide_and_every_guide_a_command() -> None:
    assert set(GUIDES) == set(COMMANDS)


@pytest.fixture
def quick_start(fleet: Fleet, clients: Clients, tmp_path: Path) -> Iterator[Path]:
    """A folder with what README's quick start leaves, by the small fleet; examples are run there."""
    shutil.copy(fleet.checkpoint, tmp_path / "global.safetensors")
    shutil.copy(fleet.scores, tmp_path / "scores.safetensors")
    shutil.copytree(fleet.folder / "fleet", tmp_path / "submodels")
    shutil.copytree(fleet.submodels["raspberry-pi-4"], tmp_path / "submodels" / "custom")
    shutil.copytree(clients.folders["stm32h743"], tmp_path / "trained-stm32")
    shutil.copytree(clients.folders["raspberry-pi-4"], tmp_path / "trained-custom")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in COMMANDS]
)
def test_examples_run_as_they_stand_after_the_quick_start(command: str, quick_start: Path) -> None:
    for example in GUIDES[command].examples:
        done = run_here(*words_of(example)[1:])
        assert done.code == 0, done.stderr


def test_docs_name_the_exit_codes() -> None:
    page = (ROOT / "docs" / "reference" / "exit-codes.md").read_text()
    assert all(f"| {code} | {meaning} |" in page for code, meaning in EXIT_CODES.items())


def test_what_completion_offers_is_what_there_is() -> None:
    from cahfp_cli.data.spec import KINDS, NAMES, SPLITS
    from cahfp_cli.models import libraries
    from cahfp_cli.models.spec import BUILT_IN
    from cahfp_cli.reconstruction.rules import RULES
    from cahfp_cli.running import device
    from cahfp_cli.significance.registry import find_criterion

    assert options.DEVICES == device.NAMES
    assert tuple(BUILT_IN) == options.MODELS
    assert set(options.LIBRARIES) == {f"{name}:" for name in libraries.LIBRARIES}
    named = [f"{name}@{split}" for name in NAMES for split in SPLITS]
    assert (*named, *(f"{kind}:" for kind in KINDS)) == options.DATA_SETS
    assert tuple(RULES) == options.RULES
    with pytest.raises(Exception, match="there is no criterion") as refused:
        find_criterion("none")
    assert sorted(options.CRITERIA) == str(refused.value).partition("choose one of ")[2].split(", ")


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("prune g --profile stm", ["stm32h743"]),
        ("prune g --profile mine", ["mine.toml"]),
        ("prune g --profile boards/", ["boards/other.toml"]),
        ("profile show raspberry-pi-", ["raspberry-pi-4", "raspberry-pi-5"]),
        ("profile predict g --profile jetson-o", ["jetson-orin-nano"]),
        ("prune g --selection ", ["auto", "linear", "quadratic", "independent"]),
        ("prune g --dtype f", ["fp32", "fp16"]),
        ("prune g --calibration di", ["digits@train", "digits@test"]),
        ("score g --criterion gate-t", ["gate-taylor", "gate-taylor-signed"]),
        ("reconstruct g c --rule t", ["trimmed-mean"]),
        ("train --model resnet", ["resnet18", "resnet20", "resnet32", "resnet56"]),
        ("train --schedule ", ["cosine", "constant"]),
        ("evaluate g --device ", ["auto", "cpu", "cuda", "mps"]),
        ("evaluate g --input-dtype i", ["int64"]),
        ("simulate e --backend f", ["flower"]),
    ],
)
def test_completion_offers_values(line: str, offers: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").touch()
    (tmp_path / "boards").mkdir()
    (tmp_path / "boards" / "other.toml").touch()
    words = ["cahfp", *line.split(" ")]
    asked = {
        "_CAHFP_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    found = run(cwd=tmp_path, env=asked).stdout.split()
    assert [word for word in found if not word.startswith(".")] == offers


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        ("train -o x --schedule step", "cosine or constant"),
        ("train -o x --device tpu", "auto, cpu, cuda, mps"),
        ("train -o x --input-dtype int8", "float32 or int64"),
        ("train -o x --label-smoothing x%", "10%"),
        ("prune g -o x --selection best", "auto, linear, quadratic, independent"),
        ("prune g -o x --reference teacher", "network or labels"),
        ("prune g -o x --keep 0.5 --scores s --dtype fp16 --dtype int4", "fp32, fp16 or int8"),
        ("prune g -o x --keep 101%", "25%"),
        ("prune g -o x --macs 0%", "50%"),
        ("reconstruct g c -o x --rule mean", "fill, covered, curvature, trimmed-mean, median"),
        ("reconstruct g c -o x --rule trimmed-mean --trim nan%", "10%"),
        ("reconstruct g c -o x --rule trimmed-mean --trim 50%", "below 0.5"),
        ("simulate e.toml -o x --backend ray", "local or flower"),
    ],
)
def test_a_wrong_value_is_a_usage_error_that_names_the_choices(arguments: str, choices: str) -> None:
    done = run_here(*arguments.split())
    assert done.code == 2
    assert choices in done.stderr
    assert arguments.split()[-2] in done.stderr or "rule" in done.stderr
    assert done.stdout == ""


def test_options_that_take_a_number_from_0_to_1_take_percentages() -> None:
    assert [options.number_or_percentage(text) for text in ("50%", " 7 %", "0%", "33.3%", "0.1", "-5%")] == [
        *(0.5, 0.07, 0.0, 0.333, 0.1, -0.05)
    ]
    for text in ("5 0%", "nan%", "%", "", "50%%", "1/2"):
        with pytest.raises(typer.BadParameter):
            options.number_or_percentage(text)
