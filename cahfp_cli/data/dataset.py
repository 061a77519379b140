"""A labelled set of samples in memory, and the checks that every source of data goes through."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cahfp_cli.checkpoint.metadata import InputDtype
from cahfp_cli.errors import InputError

ONE_OUTPUT = (
    "one number a sample: a softmax over one entry is always 1, so loss, accuracy and curvature say nothing.\n"
    "Give the network two outputs (of a logit z: 0 and z), or do without samples: score --criterion l2, prune without "
    "--calibration and --data."
)

Samples = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]

COLOURS = (1, 3)


@dataclass(frozen=True)
class Dataset:
    """Labelled samples.

    x: float32 (n, channels, height, width), images in 0..1; or float32 / int64 (n, ...) of the user's own.
    y: int64 (n,), each in 0..classes-1. classes: of the whole set, even where a slice lacks some of them.
    name: the spec it came from, for messages.
    """

    x: Samples
    y: Labels
    classes: int
    name: str

    def __len__(self) -> int:
        return len(self.y)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.x.shape[1:])

    @property
    def input_dtype(self) -> InputDtype:
        """The type of the samples."""
        return "int64" if self.x.dtype == np.int64 else "float32"


@dataclass(frozen=True)
class Rows:
    """Which samples are wanted: first..last-1, None for an open end."""

    first: int | None = None
    last: int | None = None

    def of(self, n: int, name: str) -> tuple[int, int]:
        """First and last of `n` samples. Raises: InputError: outside of what there is, or empty."""
        start, stop = self.first or 0, n if self.last is None else self.last
        if not 0 <= start < stop <= n:
            raise InputError(f"{name}: the slice [{start}:{stop}] does not fit, there are {n} samples (0:{n}).")
        return start, stop


WHOLE = Rows()


def make_dataset(x: Any, y: Any, name: str, classes: int | None = None, first: int = 0) -> Dataset:
    """Check and convert arrays to a Dataset.

    Images as uint8 are scaled from 0..255 to 0..1, and (n, height, width) of uint8 gets a channel axis; floating
    numbers become float32 as they are; other integers (tokens) become int64.

    Args:
        classes: number of classes; by default one more than the largest label.
        first: the number of the first of these samples in their file, for messages.
    Raises: InputError: empty, unequal lengths, labels that are no integers or out of range, NaN or Inf, a type or
        layout that is not one of these.
    """
    labels = checked_labels(np.asarray(y), name)
    samples = converted(np.asarray(x), name, first)
    check_layout(samples.shape, labels.shape, name)
    classes = int(labels.max()) + 1 if classes is None else classes
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        at = int(wrong[0])
        raise InputError(f"{name}: sample {first + at} has label {labels[at]}, but labels go from 0 to {classes - 1}.")
    return Dataset(x=samples, y=labels, classes=classes, name=name)


def check_layout(samples: tuple[int, ...], labels: tuple[int, ...], name: str) -> None:
    """Raises: InputError: arrays of these shapes are no labelled samples."""
    if len(samples) < 2 or 0 in samples[1:]:
        raise InputError(f"{name}: samples must have shape (n, ...), not {samples}.")
    if len(labels) != 1:
        raise InputError(f"{name}: labels must be integers of shape (n,), not of shape {labels}.")
    if samples[0] != labels[0]:
        raise InputError(f"{name}: {samples[0]} samples but {labels[0]} labels.")
    if labels[0] == 0:
        raise InputError(f"{name}: holds no samples.")


def checked_labels(y: Samples, name: str) -> Labels:
    """Labels as int64 (n,). Raises: InputError: another shape, or no integers."""
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise InputError(f"{name}: labels must be integers of shape (n,), not {y.dtype} of shape {shape_text(y)}.")
    return y.astype(np.int64)


def converted(x: Samples, name: str, first: int) -> Samples:
    """Samples as float32, or int64 for tokens. Raises: InputError: see make_dataset."""
    if x.ndim < 2 or 0 in x.shape[1:]:
        raise InputError(f"{name}: samples must have shape (n, ...), not {shape_text(x)}.")
    if x.dtype == np.uint8:
        return scaled_images(x, name)
    if x.dtype.kind == "f":
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes Inf and is reported below
            samples = np.ascontiguousarray(x, dtype=np.float32)
        finite = np.isfinite(samples).all(axis=tuple(range(1, samples.ndim)))
        if not finite.all():
            raise InputError(f"{name}: sample {first + int(np.argmin(finite))} holds NaN or Inf. Clean the data first.")
        return samples
    if x.dtype.kind in "iu" and x.ndim == 2:
        return np.ascontiguousarray(x, dtype=np.int64)
    raise InputError(f"{name}: samples of type {x.dtype} and shape {shape_text(x)} are not understood: give images as "
                     "uint8 (0..255) or float32, tokens as integers (n, length).")  # fmt: skip


def scaled_images(x: Samples, name: str) -> Samples:
    """uint8 in 0..255 to float32 in 0..1; (n, height, width) to (n, 1, height, width)."""
    if x.ndim == 4 and x.shape[3] in COLOURS and x.shape[1] not in COLOURS:
        raise InputError(
            f"{name}: images of shape {shape_text(x)} have their channels last; "
            "store them channels first: x.transpose(0, 3, 1, 2)."
        )
    images = x[:, np.newaxis] if x.ndim == 3 else x
    return np.ascontiguousarray(images, dtype=np.float32) / np.float32(255)


def sliced(dataset: Dataset, rows: Rows) -> Dataset:
    """Some samples of a set that is in memory. Raises: InputError: outside of what there is, or none."""
    start, stop = rows.of(len(dataset), dataset.name)
    return Dataset(dataset.x[start:stop], dataset.y[start:stop], dataset.classes, dataset.name)


def check_fits(
    dataset: Dataset, input_shape: tuple[int, ...], classes: int, input_dtype: InputDtype = "float32"
) -> None:
    """Refuse data that a model cannot take.

    Raises: InputError: the sample's shape or type differs, or too many classes.
    """
    if dataset.input_shape != tuple(input_shape):
        raise InputError(
            f"{dataset.name}: samples of {times(dataset.input_shape)} do not fit the model, which takes "
            f"{times(input_shape)}. Use the data that the model was made for."
        )
    if dataset.input_dtype != input_dtype:
        raise InputError(
            f"{dataset.name}: samples of {dataset.input_dtype} do not fit the model, which takes {input_dtype}. "
            f"Use the data that the model was made for; if it takes both, pass --input-dtype {dataset.input_dtype}."
        )
    if classes == 1:
        raise InputError(f"{dataset.name} cannot tell how good the model is, which gives {ONE_OUTPUT}")
    if dataset.classes > classes:
        raise InputError(
            f"{dataset.name}: {dataset.classes} classes do not fit the model, which tells {classes} apart."
        )


def times(shape: tuple[int, ...]) -> str:
    """1x28x28."""
    return "x".join(map(str, shape))


def shape_text(array: Samples) -> str:
    """(10, 28, 28)."""
    return str(tuple(array.shape))
