"""A submodel that cannot become an ONNX file is refused before it is trained, not after."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cahfp_cli.commands.train import check_exports
from cahfp_cli.errors import VerificationError
from cahfp_cli.export.onnx_file import ExportOptions


class Inverted(nn.Module):
    """ONNX has no inverse of a matrix."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(x + 9 * torch.eye(4)).flatten(1)


def opened(model: nn.Module, folder: Path) -> Any:
    return SimpleNamespace(
        model=model, input_shape=(4, 4), input_dtype="float32", submodel=SimpleNamespace(folder=folder)
    )


def test_what_has_no_file_yet_is_tried(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"linalg_inv.*--no-onnx"):
        check_exports(opened(Inverted(), tmp_path), ExportOptions())
    check_exports(opened(nn.Flatten(), tmp_path), ExportOptions())
    assert list(tmp_path.iterdir()) == []


def test_what_was_exported_before_is_tried_only_in_another_opset(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    check_exports(opened(Inverted(), tmp_path), ExportOptions())
    with pytest.raises(VerificationError, match="linalg_inv"):
        check_exports(opened(Inverted(), tmp_path), ExportOptions(opset=13))
