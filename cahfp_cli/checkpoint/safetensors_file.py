"""Read a safetensors file tensor by tensor, or a few rows at a time, without trusting a byte of it.

Layout: a little-endian u64 header length, the header (JSON: name -> dtype, shape, data_offsets; and optionally
`__metadata__`, string -> string), then the tensors' elements, little-endian, back to back. Nothing is memory-mapped:
mapped pages count as memory, and a file that shrinks under a map kills the process.
"""

import hashlib
import math
import os
import stat
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cahfp_cli.checkpoint import strict_json
from cahfp_cli.checkpoint.dtypes import BITS, PACKED, Array, numpy_type, stored_bytes, unpacked
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.errors import InputError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_NAME_LENGTH = 1024
CONTROLS = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories that no name has: what moves a cursor, halves of characters, and ends of lines."""
MAX_AXES = 32
MAX_SIZE = 2**62
"""Of a length, an offset, or a tensor in bytes: more than any machine holds, and few enough digits for a message."""
MOST_READS = 10
"""Of the same bytes of a file whose links or rights change each time."""
HASHED_BYTES = 1 << 20
_NO_PICKLES = "is a zip archive or a pickle, and pickles are not read here: save the weights as safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `dtype` is a safetensors code such as "F32"; `start` and `end` are offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def itemsize(self) -> int:
        """Bytes an element in an array."""
        return numpy_type(self.dtype).itemsize

    @property
    def rows(self) -> int:
        """Length of axis 0; a scalar counts as one row."""
        return self.shape[0] if self.shape else 1


class SafetensorsFile:
    """A validated file. As a context manager it holds the file open; once closed, each read opens it again, and
    refuses if it is no longer the file that was validated. So thousands of files cost no open descriptors.

    sha256: of the bytes as they were validated, once that is known. A hard link, a backup or a change of rights alters
    the time of the last change of the file's status, as does whoever rewrites it and sets its other time back: from
    then on such a file is hashed anew before it is read further.
    """

    def __init__(
        self,
        path: Path,
        handle: int,
        identity: tuple[int, ...],
        tensors: dict[str, TensorInfo],
        metadata: dict[str, str],
    ) -> None:
        self.path = path
        self.tensors = tensors
        self.metadata = metadata
        self._handle: int | None = handle
        self.sha256: str | None = None
        self._identity = identity

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the descriptor; further reads open the file for their own duration."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def read(self, name: str) -> Array:
        """The whole tensor `name`: an owned, writable array of its shape and native dtype.

        Raises: InputError: no such tensor, or the file is no longer what was validated.
        """
        info = self._info(name)
        return self._elements(info, 0, info.shape)

    def read_rows(self, name: str, first: int, last: int) -> Array:
        """Rows first..last-1 (axis 0) of tensor `name`: (last - first, *shape[1:]); a scalar is its own row 0.

        Raises: InputError: no such tensor, or the file is no longer what was validated.
            IndexError: the rows are not in the tensor.
        """
        info = self._info(name)
        if not 0 <= first <= last <= info.rows:
            raise IndexError(f"rows {first}:{last} of {info.rows}")
        if not info.shape:
            return self.read(name)
        return self._elements(info, first * math.prod(info.shape[1:]), (last - first, *info.shape[1:]))

    def read_header(self) -> bytes:
        """Everything before the first element: the header's length and the header.

        Raises: InputError: the file is no longer what was validated.
        """
        size = min((info.start for info in self.tensors.values()), default=self._identity[2])
        with self._descriptor() as handle:
            header = bytearray(size)
            self._fill(handle, memoryview(header), 0)
        return bytes(header)

    def hashed(self) -> str:
        """sha256 of the whole file, in hexadecimal; it is known from then on.

        Raises: InputError: the file is no longer what was validated.
        """
        with self._descriptor() as handle:
            found = _sha256(handle)
            if not self._same(os.fstat(handle)):
                raise InputError(f"{self.path}: it changed while it was in use; run again on a file at rest.")
        self.sha256 = found
        return found

    def _same(self, status: os.stat_result) -> bool:
        """Whether a file is, as far as its status tells, the one that was validated: links and rights do not count."""
        return _identity(status)[:-1] == self._identity[:-1]

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise InputError(f"{self.path}: it has no tensor {shown(name)}.")
        return self.tensors[name]

    def _elements(self, info: TensorInfo, before: int, shape: tuple[int, ...]) -> Array:
        """Those of `shape` that come after `before` others."""
        if info.dtype in PACKED:
            return self._packed(info, before, shape)
        array = np.empty(shape, numpy_type(info.dtype))
        with self._descriptor() as handle:
            self._fill(handle, array.reshape(-1).view(np.uint8).data, info.start + before * array.itemsize)
        if info.dtype == "BOOL" and np.any(array.view(np.uint8) > 1):
            raise InputError(f"{self.path}: tensor {shown(info.name)} holds booleans that are neither 0 nor 1.")
        return array.byteswap() if sys.byteorder == "big" and array.itemsize > 1 else array

    def _packed(self, info: TensorInfo, before: int, shape: tuple[int, ...]) -> Array:
        first, last = (BITS[info.dtype] * elements for elements in (before, before + math.prod(shape)))
        data = np.empty(-(-last // 8) - first // 8, np.uint8)
        with self._descriptor() as handle:
            self._fill(handle, data.data, info.start + first // 8)
        return unpacked(data, info.dtype, first % 8, shape)

    def _fill(self, handle: int, buffer: memoryview, offset: int) -> None:
        """Read, and see afterwards that these were still the bytes that had been validated."""
        for _ in range(MOST_READS):
            if not _read_into(handle, buffer, offset):
                raise InputError(f"{self.path}: it became shorter while it was read; run again on a file at rest.")
            status = os.fstat(handle)
            if not self._same(status):
                break
            if self.sha256 is None or _identity(status) == self._identity:
                return
            if _sha256(handle) != self.sha256:
                break
            self._identity = _identity(status)  # and read again: it may have been something else meanwhile
        raise InputError(f"{self.path}: it changed while it was in use; run again on a file at rest.")

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        if self._handle is not None:
            yield self._handle
            return
        handle, _ = _open(self.path)
        try:
            yield handle
        finally:
            os.close(handle)


def open_safetensors(path: Path, max_bytes: int | None = None, max_header: int = MAX_HEADER_BYTES) -> SafetensorsFile:
    """Open `path` and validate its header completely; the elements are not read.

    Args: max_bytes: the most that a sound file can have; a larger one is refused before any of it is read. max_header:
        the most that its header can have; JSON takes 30 times its size once it is parsed.
    Raises: InputError: no regular file, not safetensors (a pickle is named as such), or a header that is damaged or
        lies: bad JSON, dtypes, shapes, or offsets that overlap, leave gaps or do not end with the file.
    """
    handle, status = _open(path)
    try:
        if max_bytes is not None and status.st_size > max_bytes:
            raise InputError(f"{path}: it has {status.st_size} bytes, but a sound one has at most {max_bytes}.")
        tensors, metadata = _header(path, handle, status.st_size, max_header)
    except BaseException:
        os.close(handle)
        raise
    return SafetensorsFile(path, handle, _identity(status), tensors, metadata)


def is_pytorch(path: Path) -> bool:
    """Whether a file is a zip archive or a pickle, as `torch.save` writes, whatever its name."""
    if not path.is_file():
        return False
    handle, _ = _open(path)
    try:
        start = bytearray(LENGTH_BYTES + 1)
        return _read_into(handle, memoryview(start), 0) and _is_pickle(start)
    finally:
        os.close(handle)


def _is_pickle(start: bytearray) -> bool:
    # A safetensors header of 640 bytes starts with the same two bytes as a pickle of protocol 2.
    is_header = start[LENGTH_BYTES:] == b"{" and int.from_bytes(start[:LENGTH_BYTES], "little") <= MAX_HEADER_BYTES
    return not is_header and (start[:4] == b"PK\x03\x04" or (start[0] == 0x80 and start[1] <= 5))


def _open(path: Path) -> tuple[int, os.stat_result]:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe must not make us wait
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be opened ({getattr(error, 'strerror', None) or error}).") from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise InputError(f"{path}: it is {kind}; a .safetensors file is expected.")
    return handle, status


def _sha256(handle: int) -> str:
    """Of all bytes of a file."""
    digest, buffer, offset = hashlib.sha256(), bytearray(HASHED_BYTES), 0
    while count := os.preadv(handle, [buffer], offset):
        digest.update(memoryview(buffer)[:count])
        offset += count
    return digest.hexdigest()


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_into(handle: int, buffer: memoryview, offset: int) -> bool:
    """Fill `buffer` from `offset`; False if the file ends before."""
    done = 0
    while done < len(buffer):
        count = os.preadv(handle, [buffer[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def _header(path: Path, handle: int, size: int, most: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    start = bytearray(LENGTH_BYTES + 1)
    if size < len(start):
        raise InputError(f"{path}: it has {size} bytes, too few for a safetensors file; it is empty or cut short.")
    if not _read_into(handle, memoryview(start), 0):
        raise InputError(f"{path}: it became shorter while it was read; run again on a file at rest.")
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if start[LENGTH_BYTES:] != b"{" or length > MAX_HEADER_BYTES:
        if _is_pickle(start):
            raise InputError(f"{path}: it {_NO_PICKLES}.")
        raise InputError(f"{path}: it is not a safetensors file (pickles and other formats are not read here).")
    if length > size - LENGTH_BYTES:
        raise InputError(
            f"{path}: its header claims {length} bytes, but {size - LENGTH_BYTES} follow; it is cut short."
        )
    if length > most:
        raise InputError(f"{path}: its header has {length} bytes, but a sound one has at most {most}.")
    text = bytearray(length)
    if not _read_into(handle, memoryview(text), LENGTH_BYTES):
        raise InputError(f"{path}: it became shorter while it was read; run again on a file at rest.")
    try:
        header = strict_json.parse(bytes(text))
        return _tensors(header, LENGTH_BYTES + length, size), _metadata(header)
    except ValueError as error:
        raise InputError(f"{path}: its safetensors header is damaged: {error}.\nCopy or make the file again.") from None


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map strings to strings")
    return metadata


def _tensors(header: dict[str, Any], data: int, size: int) -> dict[str, TensorInfo]:
    infos = [_tensor(name, entry, data, size) for name, entry in header.items() if name != "__metadata__"]
    end = data
    for info in sorted(infos, key=lambda info: (info.start, info.end)):
        if info.start != end:
            fault = "overlaps the one before it" if info.start < end else "leaves a gap before it"
            raise ValueError(f"tensor {shown(info.name)} {fault}")
        end = info.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, but the file has {size}")
    return {info.name: info for info in infos}


def _tensor(name: str, entry: Any, data: int, size: int) -> TensorInfo:
    check_name(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown(name)} must have exactly the keys dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {shown(name)} has dtype {shown(str(dtype))}; known are {', '.join(BITS)}")
    if not isinstance(shape, list) or not all(map(is_size, shape)) or len(shape) > MAX_AXES:
        raise ValueError(f"tensor {shown(name)} must have a shape of at most {MAX_AXES} integers from 0 to 2^62")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise ValueError(f"tensor {shown(name)} must have two integers from 0 to 2^62 as data_offsets")
    # NumPy multiplies the non-zero lengths even when one of the others is 0.
    if math.prod(filter(None, shape)) * numpy_type(dtype).itemsize > MAX_SIZE:
        raise ValueError(f"tensor {shown(name)} is larger than any machine can hold")
    start, end = (data + offset for offset in offsets)
    if end > size:
        raise ValueError(f"tensor {shown(name)} ends at byte {end}, but the file has {size}; it is cut short")
    needed = stored_bytes(dtype, math.prod(shape))
    if end - start != needed:
        raise ValueError(f"tensor {shown(name)} has {end - start} bytes, but shape {shape} of {dtype} needs {needed}")
    return TensorInfo(name, dtype, tuple(shape), start, end)


def is_size(value: object) -> bool:
    """Whether a JSON value is an integer from 0 to MAX_SIZE (and not a boolean, which Python counts as one)."""
    return type(value) is int and 0 <= value <= MAX_SIZE


def check_name(name: str) -> None:
    """Raises: ValueError: not a name for a tensor (empty, too long, reserved, or with control characters)."""
    controls = any(unicodedata.category(character) in CONTROLS for character in name if not character.isprintable())
    if not name or len(name) > MAX_NAME_LENGTH or controls or name == "__metadata__":
        raise ValueError(f"{shown(name)} is not a name for a tensor")
