"""An ONNX file as a classifier in ONNX Runtime, on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cahfp_cli.data.dataset import Samples
from cahfp_cli.errors import InputError, first_line
from cahfp_cli.running.rows import check_rows

TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
LOGITS = "logits"
FATAL_ONLY = 4
"""ONNX Runtime's log level at which it prints nothing of its own; errors arrive as exceptions."""


def open_session(path: Path, threads: int | None = None) -> Any:
    """An `onnxruntime.InferenceSession` that computes on `threads` CPU threads (None: its own choice).

    Raises: InputError: no such file, no sound ONNX model, or not exactly one input.
    """
    import onnxruntime as ort

    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding raises a class of its own for each status code
        raise InputError(f"{path}: ONNX Runtime does not load it: {first_line(error)}") from error
    if len(session.get_inputs()) != 1:
        names = ", ".join(i.name for i in session.get_inputs())
        raise InputError(f"{path}: must have exactly one input, has {len(session.get_inputs())} ({names}).")
    return session


def fixed_batch(session: Any) -> int | None:
    """The batch size that the file was exported for, or None if any will do."""
    shape = session.get_inputs()[0].shape
    return shape[0] if shape and isinstance(shape[0], int) else None


def sample_shape(session: Any, path: Path) -> tuple[int, ...]:
    """Shape of one sample. Raises: InputError: an axis other than the batch has no fixed length."""
    shape = session.get_inputs()[0].shape[1:]
    if not all(isinstance(length, int) for length in shape):
        raise InputError(f"{path}: input {shape} has axes of no fixed length besides the batch.")
    return tuple(shape)


def class_logits(session: Any, x: Samples, classes: int, path: Path) -> npt.NDArray[Any]:
    """Logits (n, outputs) for samples (n, ...); a file of fixed batch size gets a padded batch.

    Raises: InputError: the samples do not fit, or the output is not one row of logits a sample.
    """
    n, fixed = len(x), fixed_batch(session)
    batch = x if fixed is None or fixed == n else np.concatenate([x, np.repeat(x[-1:], fixed - n, axis=0)])
    logits = run(session, batch, path)[:n]
    check_rows(logits.shape, n, classes, f"{path}: gives")
    return logits


def output_of(session: Any) -> str:
    """The name of the output that holds the logits."""
    names = [output.name for output in session.get_outputs()]
    return LOGITS if LOGITS in names else str(names[0])


def run(session: Any, x: Samples, path: Path) -> npt.NDArray[Any]:
    """The output called `logits`, else the first, for a batch.

    Raises: InputError: the batch does not fit, or ONNX Runtime fails on it.
    """
    given = session.get_inputs()[0]
    expected = given.shape[1:]
    fits = len(given.shape) == x.ndim and all(
        not isinstance(want, int) or want == have for want, have in zip(expected, x.shape[1:], strict=True)
    )
    if not fits or TYPES.get(given.type) != x.dtype:
        raise InputError(
            f"{path}: takes samples of {'x'.join(map(str, expected))} {given.type}, "
            f"the data has {'x'.join(map(str, x.shape[1:]))} {x.dtype}."
        )
    try:
        output = session.run([output_of(session)], {given.name: x})[0]
    except Exception as error:  # see open_session
        raise InputError(f"{path}: ONNX Runtime fails on a batch of {x.shape}: {first_line(error)}") from error
    return np.asarray(output)
