"""The installed `cahfp` command, and one small fleet made with it that all tests share.

The fleet is made once: a checkpoint trained on `digits`, its scores, a submodel for each of three unlike devices. Under
pytest-xdist the first worker that needs it makes it, the others wait for a file lock.
"""

import fcntl
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

COMMAND = Path(sys.executable).with_name("cahfp")
TIMEOUT = 300
MODEL = ("--model", "resnet20", "--model-arg", "width=0.25")
TRAIN = (*MODEL, "--data", "digits@train", "--test-data", "digits@test", "--epochs", "2", "--threads", "1")
SCORE = ("--data", "digits@train[:600]", "--samples", "64", "--threads", "1")
LIMITS = {"latency": 6e-4, "storage": 80_000, "macs": 0.9, "params": 0.7}
PRUNE = ("--latency", "600us", "--storage", "80KB", "--macs", "0.9", "--params", "0.7", "--threads", "1")
PROFILES = {"jetson": "jetson-orin-nano", "stm32h743": "stm32h743", "pi4": "raspberry-pi-4"}
SUBMODEL_FILES = ("submodel.safetensors", "index_map.safetensors", "model.onnx", "report.json")
SHARES = {"jetson-orin-nano": (0, 1, 2, 3, 4), "stm32h743": (4, 5, 6), "raspberry-pi-4": (6, 7, 8, 9)}
LOCAL_TRAIN = ("--epochs", "1", "--lr", "0.02", "--threads", "1")


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


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """One thread, and nothing of the caller's that changes what a command says."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CAHFP_", "PYTHON", "COV_"))}
    return {**kept, "OMP_NUM_THREADS": "1", **(extra or {})}


def run(*arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Done:
    """Run `cahfp` with its output in pipes."""
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
    done = run(*arguments, cwd=cwd)
    assert done.code == 0, f"cahfp {' '.join(map(str, arguments))}\n{done.stderr}"
    return done


def run_here(*arguments: object) -> Done:
    """As `run`, in this process: cheaper by the seconds that importing torch takes."""
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


@pytest.fixture(scope="session")
def cahfp() -> Callable[..., Done]:
    """The installed command as a function: arguments to exit code, stdout and stderr."""
    return run


@dataclass(frozen=True)
class Fleet:
    """What `train`, `score` and `prune` made, each run with --json; `said` is what they printed, by command."""

    folder: Path
    said: dict[str, Done]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "global.safetensors"

    @property
    def scores(self) -> Path:
        return self.folder / "scores.safetensors"

    @property
    def submodels(self) -> dict[str, Path]:
        """The submodel folders, by profile."""
        return {name: self.folder / "fleet" / name for name in PROFILES.values()}


@dataclass(frozen=True)
class Clients:
    """What each device's own `train` made of its submodel, and what `reconstruct` merged."""

    folder: Path
    said: dict[str, Done]

    @property
    def folders(self) -> dict[str, Path]:
        """The trained submodel folders, by profile."""
        return {name: self.folder / "clients" / name for name in SHARES}

    @property
    def merged(self) -> Path:
        return self.folder / "merged.safetensors"


@contextmanager
def made_once(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """A folder that all workers of this test run share, and whether it is this one's turn to fill it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / name
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)
        ready = folder / "said.json"
        yield folder, not ready.exists()


def keep(folder: Path, said: Mapping[str, Done]) -> None:
    (folder / "said.json").write_text(json.dumps({name: vars(done) for name, done in said.items()}))


def kept(folder: Path) -> dict[str, Done]:
    return {name: Done(**done) for name, done in json.loads((folder / "said.json").read_text()).items()}


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """A trained and scored checkpoint with a submodel for each of three unlike devices. Read only."""
    with made_once(tmp_path_factory, "fleet") as (folder, first):
        if first:
            profiles = [part for alias in PROFILES for part in ("--profile", alias)]
            scored = ("global.safetensors", "--scores", "scores.safetensors")
            data = ("--data", "digits@test")
            said = {
                "train": run_well("train", *TRAIN, "-o", "global.safetensors", "--json", cwd=folder),
                "score": run_well(
                    "score", "global.safetensors", *SCORE, "-o", "scores.safetensors", "--json", cwd=folder
                ),
                "prune": run_well("prune", *scored, *profiles, *PRUNE, *data, "-o", "fleet", "--json", cwd=folder),
            }
            keep(folder, said)
        return Fleet(folder, kept(folder))


@pytest.fixture(scope="session")
def clients(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Clients:
    """Each submodel trained on its own device's digits, few and of few classes, and all merged. Read only."""
    with made_once(tmp_path_factory, "clients") as (folder, first):
        if first:
            (folder / "clients").mkdir()

            def train(name: str) -> Done:
                # One of the three exports what it trained; the export takes most of the time.
                export = "--onnx" if name == "stm32h743" else "--no-onnx"
                arguments = (fleet.submodels[name], "--data", f"npz:{folder / name}.npz", *LOCAL_TRAIN, export)
                return run_well("train", *arguments, "-o", f"clients/{name}", "--json", cwd=folder)

            for name in SHARES:
                write_share(folder / f"{name}.npz", name)
            with ThreadPoolExecutor(2) as pool:
                said = dict(zip(SHARES, pool.map(train, SHARES), strict=True))
            merge = [fleet.checkpoint, *(f"clients/{name}" for name in SHARES)]
            said["reconstruct"] = run_well("reconstruct", *merge, "-o", "merged.safetensors", "--json", cwd=folder)
            keep(folder, said)
        return Clients(folder, kept(folder))


def write_share(path: Path, name: str) -> None:
    """A device's own data: all training digits of its classes, for the microcontroller only 90."""
    import numpy as np

    from cahfp_cli.data.spec import load_data

    train = load_data("digits@train")
    own = np.flatnonzero(np.isin(train.y, SHARES[name]))[: 90 if name == "stm32h743" else None]
    np.savez(path, x=train.x[own], y=train.y[own], classes=10)
