"""Write a safetensors file block by block: all offsets follow from the shapes, so nothing is held in memory."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cahfp_cli.checkpoint.dtypes import Array, dtype_code, numpy_type, raw_bytes, stored_bytes
from cahfp_cli.checkpoint.safetensors_file import LENGTH_BYTES, check_name


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, safetensors dtype code, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return stored_bytes(self.dtype, math.prod(self.shape))


def write_safetensors(
    path: Path,
    tensors: Sequence[TensorSpec],
    blocks: Callable[[TensorSpec], Iterator[Array]],
    metadata: Mapping[str, str],
) -> None:
    """Write exactly `path` (see atomic.py for safety); the order of `tensors` and `metadata` does not matter.

    Args: blocks: for a tensor, its elements in C order as arrays of its dtype, usually some rows each.
    Raises: ValueError: names repeat, or blocks do not have the dtype and number of elements of their tensor.
    """
    ordered, start = layout(tensors, metadata)
    with path.open("wb") as file:
        file.write(start)
        for tensor in ordered:
            written = 0
            for block in blocks(tensor):
                if dtype_code(block.dtype) != tensor.dtype:
                    raise ValueError(f"{tensor.name}: a block is {block.dtype}, the tensor {tensor.dtype}")
                written += file.write(raw_bytes(block))
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: blocks of {written} bytes for a tensor of {tensor.nbytes}")


def save_arrays(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write named arrays of any supported dtype to exactly `path`.

    Raises: ValueError: a dtype that safetensors files of ours do not hold.
    """
    tensors = [TensorSpec(name, dtype_code(array.dtype), array.shape) for name, array in arrays.items()]
    write_safetensors(path, tensors, lambda tensor: iter([arrays[tensor.name]]), metadata)


def layout(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[list[TensorSpec], bytes]:
    """The tensors in the order in which a file has them, and everything before the first element.

    Raises: ValueError: names repeat.
    """
    # Wide elements first: each tensor then starts at a multiple of its element size, which mapping readers rely on.
    ordered = sorted(tensors, key=lambda tensor: (-numpy_type(tensor.dtype).itemsize, tensor.name))
    header = _header(ordered, metadata)
    return ordered, len(header).to_bytes(LENGTH_BYTES, "little") + header


def _header(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for tensor in tensors:
        check_name(tensor.name)
        if tensor.name in entries:
            raise ValueError(f"{tensor.name}: given twice")
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)
