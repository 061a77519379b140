"""Weights in a file beside an ONNX file: its format, Protocol Buffers, holds less than 2 GiB."""

from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.errors import InputError

LARGEST = 2**31 - 2**24
"""Bytes of weights that one file may hold; some room is left for the graph."""
ENDING = ".data"
KEPT_INSIDE = 1024
"""Tensors of fewer bytes stay in the graph, where tools read shapes and axes."""


def side_file(path: Path) -> Path:
    """Where the weights of an ONNX file go that do not fit into it."""
    return path.with_name(path.name + ENDING)


def move_weights(model: ir.Model, path: Path, largest: int) -> None:
    """Write a model's weights beside `path` if they are more than `largest` bytes; the model then refers to them."""
    held = [value.const_value for value in model.graph.initializers.values()]
    if sum(tensor.nbytes for tensor in held if tensor is not None) > largest:
        name = side_file(path).name
        ir.external_data.unload_from_model(model, path.parent, name, size_threshold_bytes=KEPT_INSIDE)


def size_of_file(path: Path) -> int:
    """Bytes of an ONNX file together with the files beside it that it says its weights are in.

    Raises: InputError: it is no ONNX file, or one of those is missing or not beside it.
    """
    return path.stat().st_size + sum(one.stat().st_size for one in side_files(path))


def side_files(path: Path) -> list[Path]:
    """The files beside an ONNX file that hold some of its weights. Raises: InputError: see `size_of_file`."""
    names = locations(path)
    for name in names:
        if name != Path(name).name or not (path.parent / name).is_file():
            raise InputError(f"{path}: its weights are in {shown(name)}, which is not beside it: copy both files.")
    return [path.parent / name for name in names]


def locations(path: Path) -> list[str]:
    """Where an ONNX file says that its weights are, as it says it. Raises: InputError: it is no ONNX file."""
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError as error:
        raise InputError(f"{path}: not a valid ONNX file.") from error
    tensors = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    return sorted({entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"})


def remove(path: Path) -> None:
    """Remove an ONNX file and the one beside it, if they are there."""
    path.unlink(missing_ok=True)
    side_file(path).unlink(missing_ok=True)
