"""Arrays in a NumPy archive (a zip of .npy files), of which any rows can be read without the others in memory.

A file of someone else's: no header is believed before the archive's own figures bear it out, and nothing is unpickled.
"""

import lzma
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from cahfp_cli.errors import InputError

MOST_BYTES = 2**33
BLOCK = 2**20
LOCAL_SIGNATURE, LOCAL_HEADER, LENGTHS_AT = b"PK\3\4", 30, 26
"""How a member's own header begins, bytes of it before its name, and where in it the lengths of name and extra field
stand."""
Array = np.ndarray[Any, np.dtype[Any]]
DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(ValueError, SyntaxError, tokenize.TokenError, TypeError, OverflowError, MemoryError),
    *(NotImplementedError, RuntimeError),  # packed in a way that zipfile does not know, or under a password
)


@dataclass(frozen=True)
class Member:
    """One array: its shape and type, where its numbers begin in the member, and whether in Fortran's order."""

    path: Path
    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    begins: int
    fortran: bool

    @property
    def rows(self) -> int:
        """Length of the first axis; 1 of a scalar."""
        return self.shape[0] if self.shape else 1

    def read(self, first: int, last: int) -> Array:
        """Rows first..last-1; of a scalar all there is.

        Raises: InputError: the member is damaged, or the rows have more than `MOST_BYTES`.
        """
        if self.fortran and len(self.shape) > 1:  # a row lies all over the member
            whole = self._numbers(0, self.dtype.itemsize * math.prod(self.shape))
            return np.ascontiguousarray(whole.reshape(self.shape[::-1]).T[first:last])
        row = self.dtype.itemsize * math.prod(self.shape[1:])
        found = self._numbers(first * row, (last - first) * row)
        return found.reshape((last - first, *self.shape[1:]) if self.shape else ())

    def greatest(self) -> int:
        """The largest of its integers, of which only some at a time are in memory; there must be one."""
        size, item = self.info.file_size - self.begins, self.dtype.itemsize
        with sound(self.path):
            return max(int(np.frombuffer(data, self.dtype).max()) for data in self._data(0, size, BLOCK // item * item))

    def _numbers(self, skipped: int, size: int) -> Array:
        """`size` bytes from `skipped` on, as numbers."""
        if size > MOST_BYTES:
            raise InputError(
                f"{self.path}: {self.info.filename} unpacks to {size} bytes, more than {MOST_BYTES}. Split it into "
                "smaller files, or take a slice of it: npz:FILE[0:1000]."
            )
        data = bytearray()
        with sound(self.path):
            for block in self._data(skipped, size, BLOCK):
                data += block
        return np.frombuffer(data, dtype=self.dtype)

    def _data(self, skipped: int, size: int, block: int) -> Iterator[bytes]:
        """`size` bytes from `skipped` on, `block` at a time. Raises: EOFError, ValueError: there are others."""
        whole = size == self.info.file_size - self.begins
        with self.path.open("rb") as file, zipfile.ZipFile(file) as archive:
            if self.info.compress_type == zipfile.ZIP_STORED and not whole:
                file.seek(stored_at(file, self.info) + self.begins + skipped)
                yield from pieces(file, size, block)
                return
            with archive.open(self.info) as stream:
                for _ in pieces(stream, self.begins + skipped, BLOCK):
                    pass
                yield from pieces(stream, size, block)
                if whole:  # at its end a member is compared with its CRC
                    stream.read(1)


@contextmanager
def sound(path: Path) -> Iterator[None]:
    """Raises: InputError: whatever NumPy, zipfile and the unpackers say about an archive that is damaged."""
    try:
        yield
    except DAMAGED as error:
        if isinstance(error, OSError) and error.filename is not None:  # it cannot be opened
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path}: not an npz archive of plain arrays ({reason}). Write it with numpy.savez(FILE, x=..., y=...)."
        ) from error


def members(path: Path) -> dict[str, Member]:
    """The arrays of an archive by name; only headers are read. Raises: InputError: not an archive of plain arrays."""
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    with sound(path), zipfile.ZipFile(path) as archive:
        found = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        return {info.filename.removesuffix(".npy"): member(path, archive, info) for info in found}


def member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    """Read the header of one array.

    Raises: ValueError: it holds Python objects, or promises another size than it has.
    """
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{info.filename} is of version {version}")
        shape, fortran, dtype = readers[version](stream)
        begins = stream.tell()
    if dtype.hasobject:
        raise ValueError(f"{info.filename} holds Python objects")
    size = dtype.itemsize * math.prod(shape)
    if any(length < 0 for length in shape) or begins + size != info.file_size:
        raise ValueError(f"{info.filename} has {info.file_size - begins} bytes, its header promises {size}")
    return Member(path, info, tuple(shape), dtype, begins, fortran)


def stored_at(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where in the file the bytes of a member begin that is not compressed. Raises: ValueError: nowhere."""
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER)
    if len(header) != LOCAL_HEADER or header[:4] != LOCAL_SIGNATURE:
        raise ValueError(f"{info.filename}: no header where the archive says")
    lengths = (int.from_bytes(header[at : at + 2], "little") for at in (LENGTHS_AT, LENGTHS_AT + 2))
    return info.header_offset + LOCAL_HEADER + sum(lengths)


def pieces(stream: IO[bytes], size: int, block: int) -> Iterator[bytes]:
    """`size` bytes, so many at a time: a header that lies costs no more memory than there are bytes.

    Raises: EOFError: there are fewer.
    """
    for done in range(0, size, block):
        wanted = min(block, size - done)
        data = stream.read(wanted)
        if len(data) != wanted:
            raise EOFError("it is cut short")
        yield data
