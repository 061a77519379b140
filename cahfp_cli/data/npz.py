"""`npz:FILE`: NumPy archives with `x` and `y`, or with `x_train`, `y_train`, `x_test`, `y_test`; optional `classes`."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from cahfp_cli.data.dataset import Dataset, make_dataset
from cahfp_cli.errors import InputError

MOST_BYTES = 2**33
Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]


def load_npz(path: Path, split: str | None, default_split: str, name: str) -> Dataset:
    """One split of an archive; an archive of just `x` and `y` is all training data, and is taken whole without a split.

    The number of classes is the archive's `classes` if it has one, else taken over all of its labels.
    Raises: InputError: not an archive of plain arrays, too large, or without the arrays of the split.
    """
    arrays = read_arrays(path)
    has_splits = "x_train" in arrays or "x_test" in arrays
    suffix = f"_{split or default_split}" if has_splits else ""
    if not has_splits and split == "test":
        raise InputError(f"{path}: has no x_test and y_test, so there is no @test in it. It has {listed(arrays)}.")
    missing = [key for key in (f"x{suffix}", f"y{suffix}") if key not in arrays]
    if missing:
        raise InputError(f"{path}: has no array {missing[0]!r}. It has {listed(arrays)}.")
    return make_dataset(arrays[f"x{suffix}"], arrays[f"y{suffix}"], name, count_classes(arrays, path))


def load_column(path: Path, column: str, split: str | None) -> np.ndarray[Any, np.dtype[Any]]:
    """One value a sample of the training split: the array `column`, or `column_train` where the archive has splits.

    Raises: InputError: not an archive of plain arrays, or none of that name.
    """
    names = (f"{column}_{split or 'train'}", column)
    arrays = read_arrays(path, names)
    name = next((name for name in names if name in arrays), None)
    if name is None:
        raise InputError(f"{path}: has no array {column!r}. It has {listed(arrays)}.")
    return arrays[name]


def count_classes(arrays: Arrays, path: Path) -> int | None:
    """Classes over all splits, or None to let the chosen labels decide."""
    if "classes" in arrays:
        stated = arrays["classes"]
        if stated.shape != () or stated.dtype.kind not in "iu" or int(stated) < 1:
            raise InputError(f"{path}: 'classes' must be one positive integer.")
        return int(stated)
    labels = [arrays[key] for key in ("y_train", "y_test") if key in arrays]
    integers = [y for y in labels if y.dtype.kind in "iu" and y.size]
    return max(int(y.max()) for y in integers) + 1 if integers else None


def read_arrays(path: Path, columns: tuple[str, ...] = ()) -> Arrays:
    """The arrays that we know the names of, and `columns`.

    Pickled objects are refused, and so is what would unpack beyond 8 GiB.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > MOST_BYTES:
            raise InputError(
                f"{path}: unpacks to {unpacked} bytes, more than {MOST_BYTES}. Split it into smaller files."
            )
        with np.load(path, allow_pickle=False) as archive:
            known = [f"{kind}{suffix}" for kind in "xy" for suffix in ("", "_train", "_test")] + ["classes", *columns]
            return {key: np.asarray(archive[key]) for key in known if key in archive.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path}: not an npz archive of plain arrays ({reason}). Write it with numpy.savez(FILE, x=..., y=...)."
        ) from error


def listed(arrays: Arrays) -> str:
    """The arrays for an error message."""
    return ", ".join(arrays) or "none of x, y, x_train, y_train, x_test, y_test"
