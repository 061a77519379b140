"""What several commands do with a network named on the command line: look for it, and open it as options say."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.formats.files import is_submodel_folder

if TYPE_CHECKING:
    from cahfp_cli.checkpoint.metadata import InputDtype
    from cahfp_cli.library.network import Network


LONGEST_SHAPE = 200
"""Characters; torch takes 64 axes, and Python no number of thousands of digits."""


def check_there(path: Path) -> None:
    """Raises: InputError: there is no such file or folder; commands call this before they import torch."""
    if not path.exists():
        raise InputError(f"{path}: there is no such file; check the name.")


def check_global(path: Path, why: str) -> None:
    """Raises: UsageError: it is a submodel folder, and `why` it cannot be; InputError: there is nothing."""
    check_there(path)
    if is_submodel_folder(path):
        raise UsageError(f"{path} is a folder: {why}.")


def open_network(
    path: Path,
    model: str | None = None,
    model_arg: list[str] | None = None,
    input_shape: str | None = None,
    input_dtype: str | None = None,
    classes: int | None = None,
    dtype_of_data: "InputDtype | None" = None,
    key: str | None = None,
    *,
    warn: Callable[[str], None],
) -> "Network":
    """Build the network of a checkpoint, which may be in shards, or of a submodel folder.

    Args: dtype_of_data: of the samples at hand, which counts where neither `input_dtype` nor the file says anything.
        key: see `open_weights`. warn: told what of the file was not taken, or will not be kept.
    Raises: UsageError, InputError: see models/checkpoint_io.py and pruning/submodel.py.
    """
    from cahfp_cli.library.network import load
    from cahfp_cli.models.spec import parse_model_args

    return load(
        path,
        model=model,
        model_args=parse_model_args(model_arg or []),
        input_shape=parse_shape(input_shape),
        input_dtype=parse_dtype(input_dtype),
        classes=classes,
        key=key,
        dtype_of_data=dtype_of_data,
        on_warning=warn,
    )


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """`3x32x32` as (3, 32, 32). Raises: UsageError: anything else."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(text) > LONGEST_SHAPE or not all(part.isdecimal() and 0 < int(part) < 2**31 for part in parts):
        text = text if len(text) <= LONGEST_SHAPE else f"{text[:LONGEST_SHAPE]}..."
        raise UsageError(f"--input-shape {text!r} is not a shape: write for example 3x32x32 (one sample, no batch).")
    return tuple(int(part) for part in parts)


def parse_dtype(text: str | None) -> "InputDtype | None":
    """The value of `--input-dtype`. Raises: UsageError: none that samples have."""
    match text:
        case None | "float32" | "int64":
            return text
    raise UsageError(f"--input-dtype {text}: choose float32, or int64 for tokens.")


def percent(share: float) -> str:
    """0.8941 as `89.4%`."""
    return f"{100 * share:.1f}%"
