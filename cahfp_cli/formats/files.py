"""Names of the files in a submodel folder."""

from pathlib import Path

from cahfp_cli.checkpoint.sharded import is_sharded

TENSORS = "submodel.safetensors"
INDEX_MAP = "index_map.safetensors"
ONNX = "model.onnx"
ONNX_WEIGHTS = "model.onnx.data"
"""Only where they are too large for the file itself."""
QUANTISED = {"fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}
REPORT = "report.json"
CURVATURE = "curvature.safetensors"
FILES = (TENSORS, INDEX_MAP, ONNX, *QUANTISED.values(), REPORT, CURVATURE)


def is_submodel_folder(path: Path) -> bool:
    """Whether it is a folder, and not that of a global checkpoint in shards."""
    return path.is_dir() and not is_sharded(path)
