"""Tensors in messages: little-endian bytes under safetensors' names of element types, without a header for each."""

import math
import sys
from collections.abc import Mapping

import numpy as np
from flwr.app import Array as Sent
from flwr.app import ArrayRecord

from cahfp_cli.checkpoint.dtypes import DTYPES, Array, dtype_code, raw_bytes
from cahfp_cli.checkpoint.safetensors_file import MAX_AXES, MAX_NAME_LENGTH, MAX_SIZE
from cahfp_cli.errors import InputError

MOST_TENSORS = 100_000
RAW = "raw"
"""How the bytes were made of the array, in Flower's words its `stype`."""


def packed(arrays: Mapping[str, Array]) -> ArrayRecord:
    """The arrays as a record of a message."""
    return ArrayRecord(
        {
            name: Sent(dtype_code(array.dtype), tuple(array.shape), RAW, bytes(raw_bytes(array)))
            for name, array in arrays.items()
        }
    )


def unpacked(record: ArrayRecord, most: int) -> dict[str, Array]:
    """The arrays in a record, read-only.

    Args: most: bytes in all that may be in it.
    Raises: InputError: it holds more, more tensors than a network has, or bytes that are not what they are said to be.
    """
    if len(record) > MOST_TENSORS or any(len(name) > MAX_NAME_LENGTH for name in record):
        raise InputError("it has more tensors, or longer names, than a network of ours.")
    size = sum(len(sent.data) for sent in record.values())
    if size > most:
        raise InputError(f"its tensors have {size} bytes, more than the {most} that were asked for.")
    return {name: _array(name, sent) for name, sent in record.items()}


def _array(name: str, sent: Sent) -> Array:
    dtype = DTYPES.get(sent.dtype)
    shape = sent.shape
    if sent.stype != RAW or dtype is None or len(shape) > MAX_AXES or not all(0 <= n <= MAX_SIZE for n in shape):
        raise InputError(f"{name!r} is not encoded as tensors are here.")
    if len(sent.data) != dtype.itemsize * math.prod(sent.shape):
        raise InputError(f"{name!r} has {len(sent.data)} bytes, which is not {list(sent.shape)} of {sent.dtype}.")
    array = np.frombuffer(sent.data, dtype).reshape(sent.shape)
    return array if sys.byteorder == "little" else array.byteswap()
