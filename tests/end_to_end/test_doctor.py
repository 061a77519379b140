"""`cahfp doctor` tells what is installed, missing, broken or too old, and only what is needed makes it fail."""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cahfp_cli.commands import doctor
from cahfp_cli.commands.doctor import Package, examine
from tests.support.commands import run, run_here
from tests.test_architecture import BLOCK_TORCH


def test_here_all_that_is_needed_is_there() -> None:
    done = run("doctor", "--json")
    assert done.code == 0, done.stderr
    found = done.json
    packages = {package["name"]: package for package in found["packages"]}
    assert found["usable"] and packages["torch"]["version"] == version("torch")
    assert {package["state"] for package in packages.values()} <= {"fine", "other"}
    assert "cpu" in found["machine"]["devices"] and "CPUExecutionProvider" in found["machine"]["providers"]
    assert {extra["name"] for extra in found["extras"]} >= {"vision", "plots", "federated"}
    assert found["machine"]["cores"] >= 1


def test_without_torch_it_says_so_with_exit_code_3_and_still_prints_everything(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCK_TORCH)
    done = run("doctor", env={"PYTHONPATH": str(tmp_path)})
    assert done.code == 3
    assert "torch" in done.stderr and "TORCH WAS IMPORTED" in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert "ONNX Runtime  " in done.stdout and "broken" in done.stdout


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python imports from, with a package of version 1.5 that cannot be imported, and one that can."""
    for name, text in {"cannot": "raise OSError('libgone.so: cannot open')", "can": ""}.items():
        (tmp_path / f"{name}.py").write_text(text)
        about = tmp_path / f"{name}-1.5.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("can", None)


@pytest.mark.parametrize(
    ("wanted", "state", "sentence"),
    [
        ("can>=1.5", "fine", None),
        ("can>=1.6", "other", "can 1.5 is not >=1.6"),
        ("can<1.5", "other", "can 1.5 is not <1.5"),
        ("cannot>=1", "broken", "cannot 1.5 cannot be imported: OSError: libgone.so"),
        ("no-such-package>=2", "missing", "pip install 'no-such-package>=2'"),
    ],
)
def test_a_package_is_fine_or_it_is_said_what_is_wrong(
    site: Path, wanted: str, state: str, sentence: str | None
) -> None:
    package = examine(Requirement(wanted))
    assert package.state == state
    said = doctor.problem_of(package)
    assert said is None if sentence is None else said is not None and sentence in said


@pytest.mark.parametrize(
    ("needed", "extra", "code"),
    [
        (Package("one", "1.0", ">=1", "fine"), Package("two", None, ">=1", "missing"), 0),
        (Package("one", "0.9", ">=1", "other"), Package("two", "1.0", ">=1", "broken", "why"), 0),
        (Package("one", None, ">=1", "missing"), Package("two", "1.0", ">=1", "fine"), 3),
        (Package("one", "1.0", ">=1", "broken", "why"), Package("two", "1.0", ">=1", "fine"), 3),
    ],
)
def test_only_what_is_needed_and_missing_or_broken_makes_it_fail(
    needed: Package, extra: Package, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "packages", lambda: ([needed], {"more": [extra]}))
    machine = {"processor": "c", "cores": 1, "instructions": [], "threads": None, "devices": [], "providers": []}
    monkeypatch.setattr(doctor, "machine", lambda: machine)
    done = run_here("doctor", "--json")
    found = json.loads(done.stdout)
    assert (done.code, found["usable"]) == (code, code == 0)
    wrong = [p.name for p in (needed, extra) if p.state in ("other", "broken")]
    assert all(any(name in problem for problem in found["problems"]) for name in wrong)
    human = run_here("doctor").stdout
    assert "one" in human and "extra more: " in human
    assert ("pip install 'cahfp[more]'" in human) == (extra.state == "missing")
