"""The idx files of MNIST and its relatives (format: yann.lecun.com/exdb/mnist), plain or gzip-compressed.

A file is read no further than its header promises, and a header may not promise more than the file can hold.
"""

import gzip
import io
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cahfp_cli.data.dataset import WHOLE, Dataset, Rows, check_layout, make_dataset
from cahfp_cli.errors import InputError

FILE_PREFIX = {"train": "train", "test": "t10k"}
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_HELP = (
    "Install it (Debian, Ubuntu: apt install dataset-fashion-mnist), or download the four .gz files from "
    "github.com/zalandoresearch/fashion-mnist and pass --data-root FOLDER."
)

UNSIGNED_BYTE = 0x08
MOST_BYTES = 2**31
GZIP_MOST_RATIO = 1040
"""Deflate cannot shrink below 1 byte in 1032 (zlib's documentation); a little more for the frame."""


def load_fashion_mnist(split: str, name: str, data_root: Path | None, rows: Rows = WHOLE) -> Dataset:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 train and 10,000 test images, 1x28x28, 10 classes.

    Looked for in `data_root`, else where Debian's package puts it.
    Raises: InputError: not there, with how to get it; or a damaged file.
    """
    folders = [data_root, data_root / "fashion-mnist"] if data_root is not None else [FASHION_FOLDER]
    for folder in folders:
        if existing(folder, f"{FILE_PREFIX[split]}-images-idx3-ubyte"):
            return load_idx(folder, split, name, rows)
    raise InputError(f"fashion-mnist is not in {' or '.join(map(str, folders))}.\n{FASHION_HELP}")


def load_idx(folder: Path, split: str, name: str, rows: Rows = WHOLE) -> Dataset:
    """Some images of one split and their labels, from a folder of files named as MNIST's.

    The number of classes is taken over the labels of both splits, as far as they are there.
    Raises: InputError: a file is missing or malformed, or images and labels differ in number.
    """
    images = required(folder, f"{FILE_PREFIX[split]}-images-idx3-ubyte")
    y = read_idx(required(folder, f"{FILE_PREFIX[split]}-labels-idx1-ubyte"), axes=1)
    check_layout(idx_shape(images, axes=3), y.shape, name)
    first, last = rows.of(len(y), name)
    x = read_idx(images, 3, first, last)
    found = [existing(folder, f"{prefix}-labels-idx1-ubyte") for prefix in FILE_PREFIX.values()]
    classes = max(int(read_idx(path, axes=1).max(initial=0)) for path in found if path) + 1
    return make_dataset(x, y[first:last], name, classes, first)


def read_idx(path: Path, axes: int, first: int = 0, last: int | None = None) -> npt.NDArray[np.uint8]:
    """Rows first..last-1 of the uint8 array in an idx file, without a last to its end; `axes` is how many axes it must
    have. Of a compressed file what comes before is unpacked, and not kept.

    Raises: InputError: another type or number of axes, bytes missing, or left over after the last row, a damaged gzip
        stream.
    """
    with opened(path) as file:
        shape = read_header(file, path, axes)
        last = shape[0] if last is None else last
        row, rows = math.prod(shape[1:]), last - first
        file.seek(first * row, io.SEEK_CUR)
        data = file.read(rows * row)
        left_over = last == shape[0] and file.read(1)
    if len(data) != rows * row or left_over:
        fault = "has bytes left over" if left_over else "is cut short"
        raise InputError(
            f"{path}: {fault}: the header promises {math.prod(shape)} bytes for {shape}. Download it again."
        )
    return np.frombuffer(data, dtype=np.uint8).reshape((rows, *shape[1:]))


def idx_shape(path: Path, axes: int) -> tuple[int, ...]:
    """What the header promises. Raises: as `read_idx`."""
    with opened(path) as file:
        return read_header(file, path, axes)


@contextmanager
def opened(path: Path) -> Iterator[BufferedIOBase]:
    """The file's bytes, unpacked. Raises: InputError: the block runs into a damaged gzip stream."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({error}). Download it again.") from error


def read_header(file: BufferedIOBase, path: Path, axes: int) -> tuple[int, ...]:
    """The shape that the header promises: two zero bytes, type, number of axes, each axis in big-endian 32 bits."""
    header = file.read(4 + 4 * axes)
    if len(header) < 4 + 4 * axes or header[:4] != bytes([0, 0, UNSIGNED_BYTE, axes]):
        raise InputError(f"{path}: not an idx file of unsigned bytes with {axes} axes. Its name may be wrong.")
    shape = struct.unpack(f">{axes}I", header[4:])
    most = path.stat().st_size * (GZIP_MOST_RATIO if path.suffix == ".gz" else 1)
    if math.prod(shape) > min(most, MOST_BYTES):
        raise InputError(f"{path}: the header promises {shape}, more than the file can hold. Download it again.")
    return shape


def required(folder: Path, name: str) -> Path:
    """The file, plain or .gz. Raises: InputError: neither is there."""
    path = existing(folder, name)
    if path is None:
        raise InputError(f"{folder}: no file {name} or {name}.gz.")
    return path


def existing(folder: Path, name: str) -> Path | None:
    """The file, plain or .gz, if one is there."""
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)
