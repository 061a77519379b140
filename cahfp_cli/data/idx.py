"""The idx files of MNIST and its relatives (format: yann.lecun.com/exdb/mnist), plain or gzip-compressed.

A file is read no further than its header promises, and a header may not promise more than the file can hold.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cahfp_cli.data.dataset import Dataset, make_dataset
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


class Readable(Protocol):
    """A binary file, compressed or not."""

    def read(self, size: int, /) -> bytes: ...


def load_fashion_mnist(split: str, name: str, data_root: Path | None) -> Dataset:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 train and 10,000 test images, 1x28x28, 10 classes.

    Looked for in `data_root`, else where Debian's package puts it.
    Raises: InputError: not there, with how to get it; or a damaged file.
    """
    folders = [data_root, data_root / "fashion-mnist"] if data_root is not None else [FASHION_FOLDER]
    for folder in folders:
        if existing(folder, f"{FILE_PREFIX[split]}-images-idx3-ubyte"):
            return load_idx(folder, split, name)
    raise InputError(f"fashion-mnist is not in {' or '.join(map(str, folders))}.\n{FASHION_HELP}")


def load_idx(folder: Path, split: str, name: str) -> Dataset:
    """Images and labels of one split from a folder of files named as MNIST's.

    The number of classes is taken over the labels of both splits, as far as they are there.
    Raises: InputError: a file is missing or malformed, or images and labels differ in number.
    """
    x = read_idx(required(folder, f"{FILE_PREFIX[split]}-images-idx3-ubyte"), axes=3)
    y = read_idx(required(folder, f"{FILE_PREFIX[split]}-labels-idx1-ubyte"), axes=1)
    found = [existing(folder, f"{prefix}-labels-idx1-ubyte") for prefix in FILE_PREFIX.values()]
    classes = max(int(read_idx(path, axes=1).max(initial=0)) for path in found if path) + 1
    return make_dataset(x, y, name, classes)


def read_idx(path: Path, axes: int) -> npt.NDArray[np.uint8]:
    """The uint8 array in an idx file; `axes` is how many axes it must have.

    Raises: InputError: another type or number of axes, bytes missing or left over, a damaged gzip stream.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            shape = read_header(file, path, axes)
            count = math.prod(shape)
            data = file.read(count + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({error}). Download it again.") from error
    if len(data) != count:
        fault = "is cut short" if len(data) < count else "has bytes left over"
        raise InputError(f"{path}: {fault}: the header promises {count} bytes for {shape}. Download it again.")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def read_header(file: Readable, path: Path, axes: int) -> tuple[int, ...]:
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
