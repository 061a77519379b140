"""Surviving indices along the axes of a tensor, and how NumPy reaches them."""

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.errors import InputError

Indices = NDArray[np.int32]
Selector = tuple[slice | NDArray[np.intp], ...]


def selector(axes: tuple[NDArray[np.integer] | None, ...], shape: tuple[int, ...]) -> Selector:
    """What to index an array of `shape` with to reach the coordinates that `axes` select (None = whole axis).

    Whole axes and runs without a gap are slices, which NumPy copies fastest, except between two axes that are index
    arrays: there they must be arrays too, because NumPy moves separated index arrays' axes to the front.
    """
    chosen: list[slice | NDArray[np.intp]] = [_run(indices) for indices in axes]
    arrays = [axis for axis, one in enumerate(chosen) if not isinstance(one, slice)]
    if arrays:
        between = range(arrays[0], arrays[-1] + 1)
        grids = np.ix_(*(np.arange(shape[axis])[chosen[axis]] for axis in between))
        chosen[arrays[0] : arrays[-1] + 1] = grids
    return tuple(chosen)


def _run(indices: NDArray[np.integer] | None) -> slice | NDArray[np.intp]:
    """A slice where increasing indices leave nothing out."""
    if indices is None:
        return slice(None)
    if len(indices) and indices[-1] - indices[0] == len(indices) - 1:
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return indices.astype(np.intp)


def check_axes(shape: tuple[int, ...], axes: tuple[Indices | None, ...]) -> None:
    """Raises: InputError: the indices of an axis (None: all) are not int32, strictly increasing and within `shape`."""
    if len(axes) != len(shape):
        raise InputError(f"it has {len(axes)} axes, but the global tensor has {len(shape)}.")
    for axis, (indices, length) in enumerate(zip(axes, shape, strict=True)):
        if indices is not None:
            _check_indices(indices, length, axis)


def _check_indices(indices: Indices, length: int, axis: int) -> None:
    if indices.dtype != np.int32 or indices.ndim != 1:
        raise InputError(f"axis {axis} has {indices.dtype} indices with {indices.ndim} axes, not int32 with one.")
    if np.any(indices[1:] <= indices[:-1]):
        raise InputError(f"axis {axis} has indices that are repeated or not in increasing order.")
    if len(indices) and not 0 <= indices[0] <= indices[-1] < length:
        wrong = indices[0] if indices[0] < 0 else indices[-1]
        raise InputError(
            f"axis {axis} has index {wrong}, but the global tensor has length {length} there (0-{length - 1})."
        )
