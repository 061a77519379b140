"""Weights beyond what one ONNX file holds: beside it, counted with it, and gone with it."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from cahfp_cli.data.dataset import Dataset
from cahfp_cli.errors import InputError, VerificationError
from cahfp_cli.export import onnx_file
from cahfp_cli.export.int8_layout import Int8Layout
from cahfp_cli.export.onnx_file import ExportOptions, export_onnx
from cahfp_cli.export.quantised import Quantisation, export_quantised
from cahfp_cli.export.side_file import size_of_file
from cahfp_cli.running.evaluation import evaluate_onnx

SMALL = ExportOptions(largest=1000)
"""As if a file held no more than 1,000 bytes of weights."""


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 4)).eval()


@pytest.fixture
def pair(tmp_path):
    path = tmp_path / "model.onnx"
    return path, export_onnx(network(), (16,), path, {"a": "b"}, options=SMALL)


def test_weights_stand_beside_the_file_and_count(pair, tmp_path):
    path, exported = pair
    beside = path.with_name("model.onnx.data")
    assert sorted(tmp_path.iterdir()) == [path, beside]
    assert beside.stat().st_size >= 4 * 16 * 256
    assert exported.size == size_of_file(path) == path.stat().st_size + beside.stat().st_size
    external = [t for t in onnx.load(path, load_external_data=False).graph.initializer if t.external_data]
    assert {entry.value for t in external for entry in t.external_data if entry.key == "location"} == {beside.name}
    rng = np.random.default_rng(0)
    data = Dataset(rng.random((40, 16), np.float32), rng.integers(0, 4, 40), 4, "random")
    export_onnx(network(), (16,), tmp_path / "one.onnx", {})
    assert evaluate_onnx(path, data, 16) == evaluate_onnx(tmp_path / "one.onnx", data, 16)


def test_equal_exports_give_equal_bytes(pair, tmp_path):
    folder = tmp_path / "again"
    folder.mkdir()
    export_onnx(network(), (16,), folder / "model.onnx", {"a": "b"}, options=SMALL)
    for entry in folder.iterdir():
        assert entry.read_bytes() == (tmp_path / entry.name).read_bytes()


def test_a_file_that_differs_leaves_neither(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "PARITY_TOLERANCE", -1.0)
    with pytest.raises(VerificationError):
        export_onnx(network(), (16,), tmp_path / "model.onnx", {}, options=SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_smaller_files_are_made_of_both(pair, tmp_path, dtype):
    rng = np.random.default_rng(0)
    data = Dataset(rng.random((64, 16), np.float32), rng.integers(0, 4, 64), 4, "random")
    wanted = Quantisation(dtype, data.x, data, True, Int8Layout("uint8", reduce_range=True))
    made = export_quantised(pair[0], tmp_path / "q.onnx", wanted)
    assert made.size == (tmp_path / "q.onnx").stat().st_size < pair[1].size
    assert not any(t.external_data for t in onnx.load(tmp_path / "q.onnx", load_external_data=False).graph.initializer)


def test_a_missing_or_foreign_side_file_is_named(pair, tmp_path):
    path, _ = pair
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    onnx.save(proto, tmp_path / "foreign.onnx")
    path.with_name("model.onnx.data").unlink()
    for broken, name in ((path, "model.onnx.data"), (tmp_path / "foreign.onnx", "../secret")):
        with pytest.raises(InputError, match=f"'{name}', which is not beside it"):
            size_of_file(broken)
