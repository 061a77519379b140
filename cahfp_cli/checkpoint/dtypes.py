"""The element types of safetensors files, as NumPy knows them."""

import sys
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
FLOATS = frozenset({"F8_E4M3", "F8_E5M2", "BF16", "F16", "F32", "F64"})
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def dtype_code(dtype: np.dtype[Any]) -> str:
    """The safetensors code of a NumPy dtype of either byte order.

    Raises: ValueError: safetensors files of ours do not hold this dtype.
    """
    code = _CODES.get(dtype if dtype.isnative else dtype.newbyteorder("="))
    if code is None:
        raise ValueError(f"dtype {dtype} cannot be stored; known are {', '.join(map(str, _CODES))}")
    return code


def largest(code: str) -> float:
    """The largest number of a float dtype, by its safetensors code."""
    limits: Any = ml_dtypes.finfo  # NumPy's, and those of bfloat16 and float8
    return float(limits(DTYPES[code]).max)


def raw_bytes(array: Array) -> memoryview:
    """The elements in C order as little-endian bytes; a view where the array already lies so, else a copy."""
    if array.dtype.isnative == (sys.byteorder == "big") and array.dtype.itemsize > 1:
        array = array.byteswap()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
