"""sha256 of a file's bytes, and of a checkpoint's contents."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from cahfp_cli.checkpoint.dtypes import PACKED, Array, dtype_code, raw_bytes
from cahfp_cli.checkpoint.safetensors_file import TensorInfo
from cahfp_cli.checkpoint.sharded import Tensors, open_checkpoint
from cahfp_cli.errors import InputError

BLOCK_BYTES = 1 << 20


def file_sha256(path: Path) -> str:
    """sha256 of the bytes of the file, in hexadecimal.

    Raises: InputError: the file cannot be read.
    """
    if not path.is_file():  # a named pipe would make us wait for ever
        raise InputError(f"{path}: there is no such file.")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None


def content_digest(checkpoint: Path | Tensors, on_block: Callable[[TensorInfo, Array], None] | None = None) -> str:
    """sha256 of the names, dtypes, shapes and elements of a checkpoint's tensors, in hexadecimal.

    Metadata and layout do not count, so that a re-saved file is the same checkpoint. Equals `arrays_digest` of the
    tensors.

    Args: on_block: sees every block of rows on the way, for who wants to check it too.
    Raises: InputError: a path that is not a sound safetensors file.
    """
    if isinstance(checkpoint, Path):
        with open_checkpoint(checkpoint) as file:
            return content_digest(file, on_block)
    infos = [checkpoint.tensors[name] for name in sorted(checkpoint.tensors)]
    digest = _table((info.name, info.dtype, info.shape) for info in infos)
    for info in infos:
        for first, last in row_blocks(info):
            block = checkpoint.read_rows(info.name, first, last)
            digest.update(raw_bytes(block))
            if on_block is not None:
                on_block(info, block)
    return digest.hexdigest()


def arrays_digest(arrays: Mapping[str, Array]) -> str:
    """As `content_digest`, of named arrays in memory.

    Raises: ValueError: a dtype that safetensors files do not hold.
    """
    names = sorted(arrays)
    digest = _table((name, dtype_code(arrays[name].dtype), arrays[name].shape) for name in names)
    for name in names:
        digest.update(raw_bytes(arrays[name]))
    return digest.hexdigest()


def row_blocks(info: TensorInfo, block_bytes: int | None = None) -> list[tuple[int, int]]:
    """Ranges of rows, each of about `block_bytes` (`BLOCK_BYTES`) and at least one row, that make up the tensor."""
    block_bytes = block_bytes or BLOCK_BYTES
    step = max(1, block_bytes * info.rows // max(1, info.nbytes))
    if info.dtype in PACKED:
        step = -(-step // 4) * 4  # four rows fill whole bytes, however long they are
    return [(first, min(first + step, info.rows)) for first in range(0, info.rows, step)] if info.nbytes else []


def _table(entries: Iterable[tuple[str, str, tuple[int, ...]]]) -> "hashlib._Hash":
    table = [[name, dtype, list(shape)] for name, dtype, shape in entries]
    return hashlib.sha256(json.dumps(table, separators=(",", ":")).encode())
