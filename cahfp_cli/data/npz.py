"""`npz:FILE`: NumPy archives with `x` and `y`, or with `x_train`, `y_train`, `x_test`, `y_test`; optional `classes`."""

from pathlib import Path

from cahfp_cli.data.archive import Array, Member, members
from cahfp_cli.data.dataset import WHOLE, Dataset, Rows, check_layout, make_dataset
from cahfp_cli.errors import InputError

KNOWN = (*(f"{kind}{suffix}" for kind in "xy" for suffix in ("", "_train", "_test")), "classes")


def load_npz(path: Path, split: str | None, default_split: str, name: str, rows: Rows = WHOLE) -> Dataset:
    """Rows of one split of an archive; an archive of just `x` and `y` is all training data, and is taken whole without
    a split. Samples outside of `rows` are not read.

    The number of classes is the archive's `classes` if it has one, else taken over all of its labels.
    Raises: InputError: not an archive of plain arrays, too large, or without the arrays of the split.
    """
    arrays = {key: one for key, one in members(path).items() if key in KNOWN}
    has_splits = "x_train" in arrays or "x_test" in arrays
    suffix = f"_{split or default_split}" if has_splits else ""
    if not has_splits and split == "test":
        raise InputError(f"{path}: has no x_test and y_test, so there is no @test in it. It has {listed(arrays)}.")
    missing = [key for key in (f"x{suffix}", f"y{suffix}") if key not in arrays]
    if missing:
        raise InputError(f"{path}: has no array {missing[0]!r}. It has {listed(arrays)}.")
    x, y = arrays[f"x{suffix}"], arrays[f"y{suffix}"]
    check_layout(x.shape, y.shape, name)
    first, last = rows.of(x.rows, name)
    classes = count_classes(arrays, path)
    return make_dataset(x.read(first, last), y.read(first, last), name, classes, first)


def load_column(path: Path, column: str, split: str | None, rows: Rows = WHOLE) -> Array:
    """One value a sample of the training split: the array `column`, or `column_train` where the archive has splits.

    Raises: InputError: not an archive of plain arrays, or none of that name.
    """
    arrays = members(path)
    name = next((name for name in (f"{column}_{split or 'train'}", column) if name in arrays), None)
    if name is None:
        raise InputError(f"{path}: has no array {column!r}. It has {listed(arrays)}.")
    first, last = rows.of(arrays[name].rows, f"{path}: {name!r}")
    return arrays[name].read(first, last)


def count_classes(arrays: dict[str, Member], path: Path) -> int | None:
    """Classes over all splits, or None where there are no labels that tell."""
    if "classes" in arrays:
        stated = arrays["classes"]
        number = int(stated.read(0, 1)) if stated.shape == () and stated.dtype.kind in "iu" else 0
        if number < 1:
            raise InputError(f"{path}: 'classes' must be one positive integer.")
        return number
    labels = [arrays[key] for key in ("y", "y_train", "y_test") if key in arrays]
    greatest = [y.greatest() for y in labels if len(y.shape) == 1 and y.dtype.kind in "iu" and y.rows]
    return max(greatest) + 1 if greatest else None


def listed(arrays: dict[str, Member]) -> str:
    """The arrays for an error message."""
    return ", ".join(arrays) or "none of x, y, x_train, y_train, x_test, y_test"
