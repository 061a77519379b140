"""Factors along the axes of a weight: what compensation multiplied its slices with, and how that is undone."""

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.checkpoint.dtypes import FLOATS, Array
from cahfp_cli.errors import InputError

Factors = NDArray[np.float32]
LEAST_FACTOR = 2.0**-6
"""All factors of an entry together are within this and its inverse: what a client changed is divided by them."""


def scaled(array: Array, factors: tuple[Factors | None, ...]) -> Array:
    """The array times the factors of each axis, in float32 (F64: in float64), rounded to its own dtype, which must be a
    float one if there are factors. What the dtype cannot hold becomes infinite or NaN.

    Server and device must get the same bits, so there is no wider product: not every library rounds float64 to a
    16-bit number in the same way.
    """
    product = factor_product(factors)
    if product is None:
        return array
    wide = np.float64 if array.dtype == np.float64 else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray((array.astype(wide) * product.astype(wide)).astype(array.dtype))


def unscaled(array: Array, original: Array, factors: tuple[Factors | None, ...]) -> NDArray[np.float64]:
    """What an array that was `scaled(original, factors)` and then trained is without the factors, in float64.

    Exact: where the factor is 1, the result is `array`; where training left an entry as it was, it is `original`, both
    bit for bit; where it moved it by d, the result is original + d / factor.
    """
    product = factor_product(factors)
    trained, before = array.astype(np.float64), original.astype(np.float64)
    if product is None:
        return trained
    moved = trained - scaled(original, factors).astype(np.float64)
    restored = np.where(moved == 0, before, before + moved / product)
    return np.asarray(np.where(product == 1, trained, restored))  # the sum may lose digits of a small `trained`


def factor_product(factors: tuple[Factors | None, ...]) -> NDArray[np.float64] | None:
    """All factors of a tensor as one array that broadcasts against it, None without any."""
    product = None
    for axis, along in enumerate(factors):
        if along is not None:
            shape = [-1 if other == axis else 1 for other in range(len(factors))]
            own = along.astype(np.float64).reshape(shape)
            product = own if product is None else product * own
    return product


def check_factors(dtype: str, submodel_shape: tuple[int, ...], factors: tuple[Factors | None, ...]) -> None:
    """Raises: InputError: the factors of a tensor of that dtype (safetensors code) and shape are not one float32 for
    each slice of an axis (None: nothing was multiplied along it), within `LEAST_FACTOR`, or it is no weight.
    """
    if dtype not in FLOATS:
        raise InputError(f"it has factors, but is {dtype}: only weights of real numbers are scaled.")
    if len(factors) != len(submodel_shape) or len(submodel_shape) < 2:
        raise InputError(
            f"it has factors for {len(factors)} axes; it has {len(submodel_shape)}, and vectors have none."
        )
    if all(along is None for along in factors):
        raise InputError("it has factors, but along no axis.")
    least = greatest = 1.0  # of the products over the axes, which may be too many to form
    for axis, (along, length) in enumerate(zip(factors, submodel_shape, strict=True)):
        if along is None:
            continue
        if along.dtype != np.float32 or along.shape != (length,):
            raise InputError(f"axis {axis} has {along.dtype} factors of shape {along.shape}, not float32 ({length},).")
        if length:
            least, greatest = least * float(along.min()), greatest * float(along.max())
        if not LEAST_FACTOR <= least <= greatest <= 1 / LEAST_FACTOR:
            raise InputError(
                f"axis {axis} has a factor that, times those of the axes before it, is not within {LEAST_FACTOR:g} and "
                f"{1 / LEAST_FACTOR:g}."
            )
