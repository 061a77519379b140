"""The element types of safetensors files, as NumPy knows them."""

import math
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
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
PACKED: dict[str, np.dtype[Any]] = {
    "F4": np.dtype(ml_dtypes.float4_e2m1fn),
    "F6_E2M3": np.dtype(ml_dtypes.float6_e2m3fn),
    "F6_E3M2": np.dtype(ml_dtypes.float6_e3m2fn),
}
"""Several elements to a byte in a file, the first in the lowest bits; one to a byte in an array. They are read and
written, but no tensor of them is cut or merged."""
BITS = {code: 8 * dtype.itemsize for code, dtype in DTYPES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
FLOATS = frozenset({"F8_E4M3", "F8_E5M2", "BF16", "F16", "F32", "F64"})
"""Those that are averaged. F8_E8M0 (scales) and the F8 types without negative zero are not: nobody trains in them."""
_CODES = {dtype: code for code, dtype in (DTYPES | PACKED).items()}


def numpy_type(code: str) -> np.dtype[Any]:
    """The dtype of arrays of a safetensors code. Raises: KeyError: no code of ours."""
    return DTYPES[code] if code in DTYPES else PACKED[code]


def stored_bytes(code: str, elements: int) -> int:
    """Bytes of so many elements in a file. Raises: ValueError: packed elements that do not fill their last byte."""
    size, rest = divmod(BITS[code] * elements, 8)
    if rest:
        raise ValueError(f"{elements} elements of {code} do not fill whole bytes")
    return size


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
    """The elements in C order as a file has them, little-endian: a view where the array already lies so, or a copy."""
    if array.dtype in PACKED.values():
        bits = BITS[dtype_code(array.dtype)]
        elements = np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8)
        return np.packbits(np.unpackbits(elements, axis=1, count=bits, bitorder="little"), bitorder="little").data
    if array.dtype.isnative == (sys.byteorder == "big") and array.dtype.itemsize > 1:
        array = array.byteswap()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def unpacked(data: NDArray[np.uint8], code: str, skipped: int, shape: tuple[int, ...]) -> Array:
    """Elements of a packed type from the bytes that hold them, of which the first `skipped` bits are others'."""
    bits, count = BITS[code], math.prod(shape)
    own = np.unpackbits(data, count=skipped + bits * count, bitorder="little")[skipped:].reshape(count, bits)
    return np.packbits(own, axis=1, bitorder="little").view(PACKED[code]).reshape(shape)
