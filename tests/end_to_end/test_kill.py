"""`kill -9` at several moments: the output is the old one or the new one, and the next run cleans up and succeeds."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import COMMAND, TIMEOUT, environment
from tests.support.fleet import MODEL, Fleet

PRUNE = ("--params", "0.5", "--threads", "1", "--force")
TRAIN = ("train", *MODEL, "--steps", "4", "--batch-size", "16", "--threads", "1", "--force")
POLL = 0.0003
State = dict[str, bytes] | bytes | None
Moment = Callable[[Path, subprocess.Popen[str]], bool]


def temporaries(target: Path) -> list[Path]:
    return list(target.parent.glob(f".{target.name}.*.tmp"))


def writing(target: Path, process: subprocess.Popen[str]) -> bool:
    """The temporary has just come into being."""
    return bool(temporaries(target))


def has(name: str) -> Moment:
    """The temporary folder has this file."""
    return lambda target, process: any((folder / name).exists() for folder in temporaries(target))


def training(target: Path, process: subprocess.Popen[str]) -> bool:
    """The first epoch was reported."""
    assert process.stderr is not None
    return process.stderr.readline().startswith("epoch 1")


def state(target: Path) -> State:
    if target.is_dir():
        return {path.name: path.read_bytes() for path in target.iterdir()}
    return target.read_bytes() if target.exists() else None


def heed_interrupts() -> None:
    """Jobs that a shell starts in the background ignore the signal, and hand that down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(arguments: tuple[object, ...]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(COMMAND), *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=heed_interrupts,
    )


def states_after_kills(
    arguments: tuple[object, ...], target: Path, moments: tuple[tuple[Moment, float], ...]
) -> Iterator[State]:
    """The output after each of several runs that was killed at its moment, or so many seconds later."""
    for moment, later in moments:
        with start(arguments) as process:
            deadline = time.monotonic() + TIMEOUT
            while not moment(target, process):
                assert process.poll() is None, f"it ended before the moment came: {process.stderr}"
                assert time.monotonic() < deadline
                time.sleep(POLL)
            time.sleep(later)
            process.kill()
        others = set(target.parent.iterdir()) - {target}
        assert all(path.name.startswith(f".{target.name}.") and path.suffix == ".tmp" for path in others)
        yield state(target)


def run_whole(arguments: tuple[object, ...], target: Path) -> State:
    """The output of a run that nobody disturbs; what killed runs left behind is gone."""
    with start(arguments) as process:
        message = process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == 0, message
    assert list(target.parent.iterdir()) == [target]
    return state(target)


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over an old one"])
def test_prune(fleet: Fleet, tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "out" / "submodel"
    target.parent.mkdir()
    if existing:
        target.mkdir()
        for path in fleet.submodels["stm32h743"].iterdir():
            (target / path.name).write_bytes(path.read_bytes())
    old = state(target)
    arguments = ("prune", fleet.checkpoint, "--scores", fleet.scores, *PRUNE, "-o", target)
    moments: tuple[tuple[Moment, float], ...] = ((writing, 0.5), (has("model.onnx"), 0))
    if existing:  # without the export the files follow one another within milliseconds
        arguments = (*arguments, "--no-onnx")
        moments = ((writing, 0), (has("report.json"), 0), (has("report.json"), 0.003))
    found = list(states_after_kills(arguments, target, moments))
    new = run_whole(arguments, target)
    assert isinstance(new, dict) and len(new) == (3 if existing else 4) and new != old
    assert all(each in (old, new) for each in found)
    assert found[0] == old


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over an old one"])
def test_train(fleet: Fleet, tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "out" / "model.safetensors"
    target.parent.mkdir()
    if existing:
        target.write_bytes(fleet.checkpoint.read_bytes())
    old = state(target)
    arguments = (*TRAIN, "-o", target)
    moments: tuple[tuple[Moment, float], ...] = ((training, 0), (writing, 0.002 if existing else 0))
    found = list(states_after_kills(arguments, target, moments))
    new = run_whole(arguments, target)
    assert isinstance(new, bytes) and new != old
    assert all(each in (old, new) for each in found)
    assert found[0] == old


def test_interrupting_exits_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out" / "model.safetensors"
    target.parent.mkdir()
    with start((*TRAIN, "--steps", "100000", "-o", target)) as process:
        while not training(target, process):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        try:
            message = process.communicate(timeout=TIMEOUT)[1]
        finally:
            process.kill()
    assert process.returncode == 130
    assert "interrupted" in message and "Traceback" not in message
    assert not list(target.parent.iterdir())
