"""A submodel's tensor out of the global one, and back to its places."""

import numpy as np

from cahfp_cli.checkpoint.dtypes import Array, dtype_code
from cahfp_cli.errors import InputError
from cahfp_cli.formats.axes import selector
from cahfp_cli.formats.factors import scaled, unscaled
from cahfp_cli.formats.index_map import TensorMap


def gather(array: Array, tensor_map: TensorMap) -> Array:
    """The submodel's tensor, a new array of `submodel_shape`, from the global one; without factors no bit changes.

    Raises: InputError: `array` does not have the shape or dtype of the map, or its dtype cannot hold it times its
        factors.
    """
    _check_array(array, tensor_map.shape, tensor_map.dtype)
    chosen = np.array(array[selector(tensor_map.axes, tensor_map.shape)], dtype=array.dtype, copy=True, order="C")
    if not tensor_map.factors:
        return chosen
    return _finite(scaled(chosen, tensor_map.factors), "times its factors")


def scatter(submodel_array: Array, tensor_map: TensorMap, into: Array) -> None:
    """Write the submodel's tensor to its places in the global tensor `into`, in place; the inverse of `gather`.

    Where there are factors, `into` must hold the values that the submodel was cut from.

    Raises: InputError: an array does not have the shape or dtype of the map, or the dtype cannot hold the result.
    """
    _check_array(submodel_array, tensor_map.submodel_shape, tensor_map.dtype)
    _check_array(into, tensor_map.shape, tensor_map.dtype)
    places = selector(tensor_map.axes, tensor_map.shape)
    if tensor_map.factors:
        with np.errstate(over="ignore", invalid="ignore"):
            restored = unscaled(submodel_array, into[places], tensor_map.factors).astype(into.dtype)
        submodel_array = _finite(restored, "without its factors")
    into[places] = submodel_array


def _finite(array: Array, when: str) -> Array:
    if not np.all(np.isfinite(array)):
        raise InputError(
            f"{when}, a tensor has numbers too large for {dtype_code(array.dtype)}; "
            "keep the checkpoint in a wider dtype."
        )
    return array


def _check_array(array: Array, shape: tuple[int, ...], dtype: str) -> None:
    if array.shape != shape or dtype_code(array.dtype) != dtype:
        raise InputError(
            f"an array is {array.dtype} {list(array.shape)}, but the index map says {dtype} {list(shape)}."
        )
