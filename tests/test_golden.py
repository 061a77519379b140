"""Files that an earlier version wrote, one of every format: this one reads them, and makes the same of them.

`scripts/golden.py --keep` made them; it is run again only for a new format, and the old files stay.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tests.support.commands import run_here

GOLDEN = Path(__file__).parent / "golden"
SAID: dict[str, Any] = json.loads((GOLDEN / "inspect.json").read_text())


@pytest.fixture(autouse=True)
def in_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are told as they were given."""
    monkeypatch.chdir(GOLDEN)


def well(*arguments: object) -> Any:
    done = run_here(*arguments, "--json")
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def content(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a file and its record, without what it says of the versions and files that it came from."""
    with safe_open(path, "numpy") as file:
        record = json.loads((file.metadata() or {})["cahfp"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    record.pop("provenance", None)
    return tensors, record


def assert_same(path: Path, golden: Path) -> None:
    tensors, record = content(path)
    expected, expected_record = content(golden)
    assert record == expected_record
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and tensor.tobytes() == expected[name].tobytes(), name


def test_no_file_was_changed() -> None:
    sums = dict(reversed(line.split("  ")) for line in (GOLDEN / "SHA256SUMS").read_text().splitlines())
    files = {str(f.relative_to(GOLDEN)): f for f in GOLDEN.rglob("*") if f.is_file() and f.name != "SHA256SUMS"}
    assert {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()} == sums


@pytest.mark.parametrize("name", SAID)
def test_what_a_file_says_of_itself_stays(name: str) -> None:
    assert well("inspect", name) == SAID[name]


def test_the_same_submodel_is_cut(tmp_path: Path) -> None:
    profile = ("--profile", "stm32h743", "--macs", 0.6, "--no-onnx", "--quiet")
    well("prune", "global.safetensors", "--scores", "scores.safetensors", *profile, "-o", tmp_path / "out")
    for name in ("submodel.safetensors", "index_map.safetensors"):
        assert_same(tmp_path / "out" / "stm32h743" / name, GOLDEN / "fleet" / "stm32h743" / name)


def test_the_same_is_merged(tmp_path: Path) -> None:
    command = ("reconstruct", "global.safetensors", "client-a", "client-b")
    well(*command, "-o", tmp_path / "merged.safetensors")
    assert_same(tmp_path / "merged.safetensors", GOLDEN / "merged.safetensors")


def test_a_partial_aggregate_is_merged_as_its_client_would_be(tmp_path: Path) -> None:
    for name, first in (("direct", "client-a"), ("partial", "a.partial.safetensors")):
        command = ("reconstruct", "global.safetensors", first, "client-b", "--rule", "fill")
        well(*command, "-o", tmp_path / f"{name}.safetensors")
    assert_same(tmp_path / "partial.safetensors", tmp_path / "direct.safetensors")


@pytest.mark.parametrize("folder", ["fleet/stm32h743", "compensated", "cut", "client-a"])
def test_a_submodel_is_trained_on(folder: str, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(GOLDEN / folder, tmp_path / "copied"))
    step = ("--data", "digits@train[:16]", "--steps", 1, "--no-onnx", "--quiet")
    assert well("train", copied, *step, "-o", tmp_path / "trained")["training"]["loss"] > 0


def test_the_onnx_file_computes_what_its_folder_does() -> None:
    data = ("--data", "digits@test[:50]", "--no-latency", "--quiet")
    folder, file = (well("evaluate", f"fleet/stm32h743{rest}", *data)["loss"] for rest in ("", "/model.onnx"))
    assert folder == pytest.approx(file, rel=1e-4)
