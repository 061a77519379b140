"""A network with what files must know of it: from a checkpoint, from a submodel folder, or from a live module."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cahfp_cli.checkpoint.digest import content_digest
from cahfp_cli.checkpoint.in_memory import TensorsInMemory
from cahfp_cli.checkpoint.metadata import CheckpointMetadata, InputDtype, ModelSpec, Provenance, Scalar
from cahfp_cli.coupling.adapters import adapt
from cahfp_cli.coupling.analysis import Analysis, analyse
from cahfp_cli.coupling.comparison import SAMPLES
from cahfp_cli.coupling.slicing import clone
from cahfp_cli.data.dataset import Dataset, check_fits
from cahfp_cli.errors import UsageError
from cahfp_cli.formats.files import INDEX_MAP, TENSORS, is_submodel_folder
from cahfp_cli.models.checkpoint_io import count_outputs, load_checkpoint, save_checkpoint
from cahfp_cli.models.inputs import torch_type
from cahfp_cli.models.spec import is_code, live
from cahfp_cli.models.tensors import check_can_be_saved, saved_state, state_arrays
from cahfp_cli.provenance import portable, provenance
from cahfp_cli.pruning.submodel import LoadedSubmodel, load_submodel


def warn(text: str) -> None:
    """A Python warning, which is what a library has in place of standard error."""
    warnings.warn(text, stacklevel=3)


@dataclass(frozen=True)
class Network:
    """A network from a checkpoint, a module or a submodel folder; `submodel` is None but for the last.

    model: in evaluation mode, on the CPU. digest: content digest of the global checkpoint. files: what was read, for
    provenance; none for a live module. tensors: those of the file, in its own dtypes.
    """

    model: nn.Module
    spec: ModelSpec
    input_shape: tuple[int, ...]
    input_dtype: InputDtype
    classes: int
    digest: str
    files: tuple[Path, ...]
    tensors: Mapping[str, torch.Tensor]
    submodel: LoadedSubmodel | None = None


def load(
    source: Path | str | nn.Module,
    *,
    model: str | None = None,
    model_args: Mapping[str, Scalar] | None = None,
    input_shape: tuple[int, ...] | None = None,
    input_dtype: InputDtype | None = None,
    classes: int | None = None,
    key: str | None = None,
    dtype_of_data: InputDtype | None = None,
    on_warning: Callable[[str], None] = warn,
) -> Network:
    """A network to score, prune, evaluate and merge.

    Args:
        source: a checkpoint (ours or anybody's, also in shards), a submodel folder, or a live module, which is copied.
        model, model_args: how to build it (`cahfp --help` lists the specs), where the file does not say; of a live
            module, how others will, who have only its files.
        input_shape: of one sample, without the batch; needed for a live module and where the file does not say.
        input_dtype: `float32`, or `int64` for tokens. classes: outputs of the network; counted by running it without.
        key: of a checkpoint with several networks in it, which.
        dtype_of_data: of the samples at hand, which counts where neither `input_dtype` nor the file says anything.
        on_warning: told what of the file was not taken, or will not be kept.
    Raises: UsageError, InputError: the source does not say what is needed, is damaged, or does not fit.
    """
    if isinstance(source, nn.Module):
        if input_shape is None:
            raise UsageError("a live module says nothing of its input: pass input_shape, such as (3, 32, 32).")
        return from_module(source, model, model_args or {}, input_shape, input_dtype or "float32", classes)
    path = Path(source)
    if is_submodel_folder(path):
        if model_args or input_shape or input_dtype or classes or key:
            raise UsageError(
                f"{path} is a submodel folder, which records its model arguments, classes, and the shape and type of "
                "its input."
            )
        return of_submodel(load_submodel(path, model))
    checkpoint = load_checkpoint(
        path,
        model=model,
        model_args=model_args,
        input_shape=input_shape,
        input_dtype=input_dtype,
        dtype_of_data=dtype_of_data,
        classes=classes,
        key=key,
    )
    for remark in checkpoint.remarks:
        on_warning(remark)
    return Network(
        model=adapt(checkpoint.model),
        spec=checkpoint.spec,
        input_shape=checkpoint.input_shape,
        input_dtype=checkpoint.input_dtype,
        classes=checkpoint.classes,
        digest=checkpoint.digest,
        files=checkpoint.files,
        tensors=checkpoint.tensors,
    )


def of_submodel(loaded: LoadedSubmodel) -> Network:
    """A submodel folder as a network of its own."""
    about = loaded.metadata
    return Network(
        model=loaded.model,
        spec=about.model,
        input_shape=about.input_shape,
        input_dtype=about.input_dtype,
        classes=about.classes,
        digest=about.checkpoint,
        files=(loaded.folder / TENSORS, loaded.folder / INDEX_MAP),
        tensors=loaded.tensors,
        submodel=loaded,
    )


def from_module(
    module: nn.Module,
    model: str | None,
    model_args: Mapping[str, Scalar],
    input_shape: tuple[int, ...],
    input_dtype: InputDtype,
    classes: int | None,
) -> Network:
    """As `load`, of a module as it is now. Raises: InputError: it cannot be copied, saved or run."""
    check_can_be_saved(module)
    copied = clone(module).cpu().eval()
    name = type(module).__qualname__
    tensors = saved_state(copied)
    return Network(
        model=adapt(copied),
        spec=live(type(module)) if model is None else ModelSpec(spec=model, args=dict(model_args)),
        input_shape=tuple(input_shape),
        input_dtype=input_dtype,
        classes=classes or count_outputs(copied, tuple(input_shape), input_dtype, Path(name)),
        digest=content_digest(TensorsInMemory(Path(name), state_arrays(copied), {})),
        files=(),
        tensors=tensors,
    )


def save(network: Network, path: Path | str, *, examples: int | None = None, force: bool = False) -> None:
    """Write a network as a global checkpoint, which `reconstruct` merges into.

    Args: examples: samples that it was trained on, for the record.
    Raises: InputError: the file exists and not `force`.
    """
    save_network(network, Path(path), provenance("save", {}, network.files), examples, force)


def save_network(network: Network, path: Path, origin: Provenance, examples: int | None, force: bool) -> None:
    """As `save`, with what is to be recorded."""
    metadata = CheckpointMetadata(
        model=recorded(network.spec),
        input_shape=network.input_shape,
        input_dtype=network.input_dtype,
        classes=network.classes,
        num_examples=examples,
        provenance=origin,
    )
    save_checkpoint(path, network.model, metadata, force)


def recorded(spec: ModelSpec) -> ModelSpec:
    """The spec as a file records it: of code, whose path the user must give again anyway, without its folders."""
    return spec.model_copy(update={"spec": portable(spec.spec)}) if is_code(spec.spec) else spec


def analysed(network: Network, data: Dataset | None, on_warning: Callable[[str], None] = warn) -> Analysis:
    """The structure of a network, run on the first of the samples that there are; what its runs showed is said.

    Raises: InputError, VerificationError: see coupling/analysis.py.
    """
    found = analyse(network.model, network.input_shape, torch_type(network.input_dtype), first_samples(data))
    for remark in found.behaviour.remarks:
        on_warning(remark)
    return found


def first_samples(data: Dataset | None) -> torch.Tensor | None:
    """As many samples as networks are compared on; None where there are fewer."""
    return torch.from_numpy(data.x[:SAMPLES]) if data is not None and len(data) >= SAMPLES else None


def check_data(dataset: Dataset, network: Network) -> None:
    """Raises: InputError: the network cannot take these samples, or does not tell their classes apart."""
    check_fits(dataset, network.input_shape, network.classes, network.input_dtype)
