"""What the fixtures `fleet` and `clients` are: files of one small fleet that all tests share."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.commands import Done

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


def write_share(path: Path, name: str) -> None:
    """A device's own data: all training digits of its classes, for the microcontroller only 90."""
    import numpy as np

    from cahfp_cli.data.spec import load_data

    train = load_data("digits@train")
    own = np.flatnonzero(np.isin(train.y, SHARES[name]))[: 90 if name == "stm32h743" else None]
    np.savez(path, x=train.x[own], y=train.y[own], classes=10)
