"""Processes of --jobs end with the process that began them, whatever ends that, and hold the output folder as long."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from cahfp_cli.checkpoint.sole_writer import sole_writer
from cahfp_cli.errors import InputError
from cahfp_cli.federation.simulation import EXPERIMENT, recorded, simulate
from cahfp_cli.federation.workers import workers
from tests.support.commands import COMMAND, environment, run
from tests.support.experiments import PROVENANCE, TOML, experiment, write_toml

PARENT = """
import os, sys, time
from pathlib import Path
from cahfp_cli.checkpoint.sole_writer import sole_writer
from cahfp_cli.federation.workers import workers


def busy(folder, number):
    Path(folder, f"pid{number}").write_text(str(os.getpid()))
    while True:
        Path(folder, f"alive{number}").write_text(str(time.monotonic()))


if __name__ == "__main__":
    with sole_writer(Path(sys.argv[1])) as held, workers(2, held) as pool:
        for done in [pool.submit(busy, sys.argv[1], number) for number in range(2)]:
            done.result()
"""
PATIENCE = 60.0
"""Seconds, for a machine that does other things too."""


def within(true: Callable[[], bool]) -> bool:
    last = time.monotonic() + PATIENCE
    while not true() and time.monotonic() < last:
        time.sleep(0.02)
    return true()


def state(pid: int) -> str:
    """As the system tells it: T for a stopped process, Z for one that has ended; Z for none, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def is_alive(pid: int) -> bool:
    return state(pid) != "Z"


def is_free(folder: Path) -> bool:
    try:
        with sole_writer(folder):
            return True
    except InputError:
        return False


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT], ids=lambda ending: ending.name)
def test_workers_end_with_their_process_and_the_folder_is_free_only_then(tmp_path: Path, ending: int) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    process = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(tmp_path)], stderr=subprocess.DEVNULL)
    pids = [tmp_path / f"pid{number}" for number in range(2)]
    assert within(lambda: all(path.exists() and path.read_text() for path in pids))
    workers_of_it = [int(path.read_text()) for path in pids]
    assert not is_free(tmp_path)
    if ending == signal.SIGINT:  # it ends its workers itself
        process.send_signal(ending)
    else:
        os.kill(workers_of_it[0], signal.SIGSTOP)
        assert within(lambda: state(workers_of_it[0]) == "T")  # it cannot notice now
        process.send_signal(ending)
        assert within(lambda: not is_alive(workers_of_it[1]))
        assert not is_free(tmp_path)
        os.kill(workers_of_it[0], signal.SIGCONT)
    assert within(lambda: not is_alive(workers_of_it[0])) and within(lambda: is_free(tmp_path))
    process.wait(PATIENCE)
    assert process.returncode != 0


def test_a_worker_that_is_ended_from_outside_is_said_so(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="ended from outside"),
        sole_writer(tmp_path) as held,
        workers(1, held) as pool,
    ):
        pool.submit(os._exit, 1).result()


def test_a_second_writer_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    asked, output = experiment(methods=["heterofl"], rounds=1), tmp_path / "out"
    output.mkdir()
    (output / EXPERIMENT).write_text(recorded(asked))
    with sole_writer(output), pytest.raises(InputError, match="another process is writing"):
        simulate(asked, output, PROVENANCE, resume=True)
    assert [path.name for path in output.rglob("*")] == [EXPERIMENT]


@contextmanager
def simulating(toml: Path, output: Path):  # type: ignore[no-untyped-def]
    arguments = ["simulate", str(toml), "-o", str(output), "--threads", "1", "--jobs", "2"]
    process = subprocess.Popen(
        [str(COMMAND), *arguments], env=environment(), stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def group_of(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and is_alive(int(entry.name)):
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session:
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT], ids=lambda ending: ending.name)
def test_the_command_takes_its_workers_with_it(tmp_path: Path, ending: int) -> None:
    toml, output = write_toml(tmp_path / "e.toml", TOML.replace("rounds = 2", "rounds = 500")), tmp_path / "out"
    with simulating(toml, output) as process:
        assert within(lambda: len(list(output.rglob("state.json"))) == 2)
        second = run("simulate", toml, "-o", output, "--resume")
        assert second.code == 3 and "another process is writing" in second.stderr
        process.send_signal(ending)
        process.wait(PATIENCE)
        assert process.returncode == (130 if ending == signal.SIGINT else -signal.SIGTERM)
        assert within(lambda: group_of(process.pid) == [])
        assert is_free(output)
