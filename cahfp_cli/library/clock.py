"""What a network takes on this machine."""

from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from cahfp_cli.checkpoint.metadata import InputDtype
from cahfp_cli.export.onnx_file import DEFAULTS, ExportOptions, export_onnx
from cahfp_cli.models.inputs import torch_type
from cahfp_cli.running.stopwatch import seconds_a_call


def seconds_here(
    network: nn.Module,
    shape: tuple[int, ...],
    dtype: InputDtype,
    threads: int,
    exporting: ExportOptions | None = None,
) -> float:
    """Seconds of a call of a network on this machine's CPU, exported and run in ONNX Runtime."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(network, shape, path, {}, dtype=torch_type(dtype), options=exporting or DEFAULTS)
        return seconds_a_call(path, threads)
