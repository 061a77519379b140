"""What several commands do with a network named on the command line: open, describe and time it, record its spec."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cahfp_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cahfp_cli.checkpoint.metadata import InputDtype, ModelSpec
    from cahfp_cli.coupling.analysis import Analysis
    from cahfp_cli.data.dataset import Dataset
    from cahfp_cli.export.onnx_file import ExportOptions
    from cahfp_cli.output import Console
    from cahfp_cli.pruning.submodel import LoadedSubmodel


LONGEST_SHAPE = 200
"""Characters; torch takes 64 axes, and Python no number of thousands of digits."""


@dataclass(frozen=True)
class Network:
    """A network from a checkpoint or a submodel folder; `submodel` is None for the former.

    digest: content digest of the global checkpoint. files: what was read, for provenance. tensors: those of the
    file, in its own dtypes.
    """

    model: "nn.Module"
    spec: "ModelSpec"
    input_shape: tuple[int, ...]
    input_dtype: "InputDtype"
    classes: int
    digest: str
    files: tuple[Path, ...]
    tensors: "Mapping[str, Tensor]"
    submodel: "LoadedSubmodel | None"


def check_there(path: Path) -> None:
    """Raises: InputError: there is no such file or folder; commands call this before they import torch."""
    if not path.exists():
        raise InputError(f"{path}: there is no such file; check the name.")


def is_submodel_folder(path: Path) -> bool:
    """Whether it is a folder, and not that of a global checkpoint in shards."""
    from cahfp_cli.checkpoint.sharded import is_sharded

    return path.is_dir() and not is_sharded(path)


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
) -> Network:
    """Build the network of a checkpoint, which may be in shards, or of a submodel folder.

    Args: dtype_of_data: of the samples at hand, which counts where neither `input_dtype` nor the file says anything.
        key: see `open_weights`. warn: told what of the file was not taken, or will not be kept.
    Raises: UsageError, InputError: see models/checkpoint_io.py and pruning/submodel.py.
    """
    from cahfp_cli.coupling.adapters import adapt
    from cahfp_cli.formats.files import INDEX_MAP, TENSORS
    from cahfp_cli.models.checkpoint_io import load_checkpoint
    from cahfp_cli.models.spec import parse_model_args
    from cahfp_cli.pruning.submodel import load_submodel

    if is_submodel_folder(path):
        if model_arg or input_shape or input_dtype or classes or key:
            raise UsageError(
                f"{path} is a submodel folder, which records its model arguments, classes, and the shape and type of "
                "its input."
            )
        loaded = load_submodel(path, model)
        about = loaded.metadata
        return Network(
            model=loaded.model,
            spec=about.model,
            input_shape=about.input_shape,
            input_dtype=about.input_dtype,
            classes=about.classes,
            digest=about.checkpoint,
            files=(path / TENSORS, path / INDEX_MAP),
            tensors=loaded.tensors,
            submodel=loaded,
        )
    checkpoint = load_checkpoint(
        path,
        model=model,
        model_args=parse_model_args(model_arg or []),
        input_shape=parse_shape(input_shape),
        input_dtype=parse_dtype(input_dtype),
        dtype_of_data=dtype_of_data,
        classes=classes,
        key=key,
    )
    for remark in checkpoint.remarks:
        warn(remark)
    return Network(
        model=adapt(checkpoint.model),
        spec=checkpoint.spec,
        input_shape=checkpoint.input_shape,
        input_dtype=checkpoint.input_dtype,
        classes=checkpoint.classes,
        digest=checkpoint.digest,
        files=checkpoint.files,
        tensors=checkpoint.tensors,
        submodel=None,
    )


def analysed(network: Network, console: "Console", data: "Dataset | None" = None) -> "Analysis":
    """The structure of a network, run on the first of the samples that there are; what its runs showed is said.

    Raises: InputError, VerificationError: see coupling/analysis.py.
    """
    from cahfp_cli.coupling.analysis import analyse
    from cahfp_cli.models.inputs import torch_type

    found = analyse(network.model, network.input_shape, torch_type(network.input_dtype), first_samples(data))
    for remark in found.behaviour.remarks:
        console.warn(remark)
    return found


def first_samples(data: "Dataset | None") -> "Tensor | None":
    """As many samples as networks are compared on; None where there are fewer."""
    import torch

    from cahfp_cli.coupling.comparison import SAMPLES

    return torch.from_numpy(data.x[:SAMPLES]) if data is not None and len(data) >= SAMPLES else None


def recorded(spec: "ModelSpec") -> "ModelSpec":
    """The spec as a file records it: of code, whose path the user must give again anyway, without its folders."""
    from cahfp_cli.models.spec import is_code
    from cahfp_cli.provenance import portable

    return spec.model_copy(update={"spec": portable(spec.spec)}) if is_code(spec.spec) else spec


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


def check_data(dataset: "Dataset", network: Network) -> None:
    """Raises: InputError: the network cannot take these samples, or does not tell their classes apart."""
    from cahfp_cli.data.dataset import check_fits

    check_fits(dataset, network.input_shape, network.classes, network.input_dtype)


def percent(share: float) -> str:
    """0.8941 as `89.4%`."""
    return f"{100 * share:.1f}%"


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were set, for provenance."""
    return {name: value for name, value in options.items() if value not in (None, False, [])}


def seconds_here(
    network: "nn.Module",
    shape: tuple[int, ...],
    dtype: "InputDtype",
    threads: int,
    exporting: "ExportOptions | None" = None,
) -> float:
    """Seconds of a call of a network on this machine's CPU, exported and run in ONNX Runtime."""
    from tempfile import TemporaryDirectory

    from cahfp_cli.export.onnx_file import DEFAULTS, export_onnx
    from cahfp_cli.models.inputs import torch_type
    from cahfp_cli.running.stopwatch import seconds_a_call

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(network, shape, path, {}, dtype=torch_type(dtype), options=exporting or DEFAULTS)
        return seconds_a_call(path, threads)
