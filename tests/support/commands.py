"""The installed `cahfp` command: started anew, forked from a process that has its imports, or in this process.

`run` forks, which saves the seconds that importing torch takes, and is a process of its own all the same. `start`
begins the installed script as a shell does: for tests of just that (same bytes from two processes, a torch that cannot
be imported, the wheel), and wherever the environment differs from that of this test run.
"""

import functools
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.forked import Server

COMMAND = Path(sys.executable).with_name("cahfp")
TIMEOUT = 300


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """What it printed, which must be one JSON document and nothing else."""
        return json.loads(self.stdout)

    @property
    def error(self) -> str:
        """What it printed to standard error but for warnings, on one line."""
        lines = [line.strip() for line in self.stderr.splitlines() if not line.startswith("warning:")]
        return " ".join(line for line in lines if line).removeprefix("error: ")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """One thread, and nothing of the caller's that changes what a command says."""
    callers = ("CAHFP_", "PYTHON", "COV_", "PYTEST_CURRENT_TEST")
    imports = ("KMP_", "TORCHINDUCTOR_")  # what scikit-learn and torch set where they are imported
    kept = {name: value for name, value in os.environ.items() if not name.startswith(callers + imports)}
    return {**kept, "OMP_NUM_THREADS": "1", **(extra or {})}


AT_START = environment()


def run(*arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Done:
    """Run `cahfp` with its output in pipes."""
    wanted = environment(env)
    if not server().serves(wanted):
        return start(*arguments, cwd=cwd, env=env)
    return Done(*server().run([str(COMMAND), *map(str, arguments)], cwd or Path.cwd(), wanted, TIMEOUT))


@functools.cache
def server() -> Server:
    """One for this test run, from its first command on."""
    return Server(COMMAND, AT_START)


def start(*arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Done:
    """As `run`, in a process that imports everything itself."""
    done = subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment(env),
        timeout=TIMEOUT,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def run_well(*arguments: object, cwd: Path | None = None) -> Done:
    """As `run`, for a command that must succeed."""
    return well(run(*arguments, cwd=cwd), arguments)


def start_well(*arguments: object, cwd: Path | None = None) -> Done:
    """As `start`, for a command that must succeed."""
    return well(start(*arguments, cwd=cwd), arguments)


def well(done: Done, arguments: tuple[object, ...]) -> Done:
    assert done.code == 0, f"cahfp {' '.join(map(str, arguments))}\n{done.stderr}"
    return done


def run_here(*arguments: object) -> Done:
    """As `run`, in this process: what the command imports, sets and warns of stays."""
    from cahfp_cli.app import main

    stdout, stderr = io.StringIO(), io.StringIO()
    before, code = sys.argv, 0
    sys.argv = ["cahfp", *map(str, arguments)]
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = before
    return Done(code, stdout.getvalue(), stderr.getvalue())
