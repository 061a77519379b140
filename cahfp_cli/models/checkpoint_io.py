"""Checkpoints to networks and back: our safetensors files, other people's, and plain PyTorch state dicts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from cahfp_cli.checkpoint.atomic import atomic_file
from cahfp_cli.checkpoint.digest import arrays_digest, content_digest
from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.checkpoint.metadata import (
    CheckpointMetadata,
    InputDtype,
    ModelSpec,
    Scalar,
    dump_metadata,
    metadata_or_none,
)
from cahfp_cli.checkpoint.sharded import files_of, open_checkpoint
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.models.inputs import torch_type
from cahfp_cli.models.outputs import logits_of
from cahfp_cli.models.pytorch_file import read_state_dict
from cahfp_cli.models.spec import BUILT_IN, build, resolve_spec

PYTORCH_SUFFIXES = (".pt", ".pth")
MOST_NAMED = 3
NAMES_AND_BITS = {  # element types that NumPy knows only through ml_dtypes, as integers of their width
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.int8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.int8, ml_dtypes.float8_e5m2),
}
FROM_NUMPY = {np.dtype(array): (bits, tensor) for tensor, (bits, array) in NAMES_AND_BITS.items()}


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint as a network.

    model: in evaluation mode, on the CPU; its dtypes are the network's own (weights of another floating type in the
    file were converted). input_shape, input_dtype: of one sample. digest: of the file's tensors, see `content_digest`.
    files: what was read, several for shards. tensors: those of the file, in its own dtypes; of tied parameters it may
    hold one name only.
    """

    model: nn.Module
    spec: ModelSpec
    input_shape: tuple[int, ...]
    input_dtype: InputDtype
    classes: int
    digest: str
    files: tuple[Path, ...]
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds: tensors by name, what it says of itself if it is ours, its content digest, and the files
    that it is in."""

    tensors: dict[str, torch.Tensor]
    metadata: CheckpointMetadata | None
    digest: str
    files: tuple[Path, ...]


def load_checkpoint(
    path: Path,
    *,
    model: str | None = None,
    model_args: Mapping[str, Scalar] | None = None,
    input_shape: tuple[int, ...] | None = None,
    input_dtype: InputDtype | None = None,
    dtype_of_data: InputDtype | None = None,
    classes: int | None = None,
) -> LoadedCheckpoint:
    """Build the network of a checkpoint and put its weights in.

    What is given here goes before what the file records; a file of someone else's records nothing. `classes` may be
    missing for a factory that does not ask for it: then the network's output tells. Where nobody says of which type the
    samples are, it is that of the data at hand, `dtype_of_data`, or float32.
    Raises: UsageError: the model, input shape or classes are neither given nor recorded, or the file names code to
        run; InputError: the file is damaged, or its tensors are not finite or not those of the model.
    """
    weights = read_weights(path)
    recorded = weights.metadata
    spec = resolve_spec(model, model_args or {}, recorded.model if recorded else None, path)
    input_shape = input_shape or (recorded.input_shape if recorded else None)
    if input_shape is None:
        raise UsageError(f"{path} records no input shape: pass --input-shape, such as 3x32x32.")
    input_dtype = input_dtype or (recorded.input_dtype if recorded else None) or dtype_of_data or "float32"
    classes = classes or (recorded.classes if recorded else None)
    if spec.spec in BUILT_IN:
        # A lying file could ask for a network of any size: compare shapes before memory is spent on it.
        with torch.device("meta"):
            check_tensors(path, weights.tensors, build(spec, input_shape, classes))
    network = build(spec, input_shape, classes)
    check_tensors(path, weights.tensors, network)
    check_finite(path, weights.tensors)
    network.load_state_dict(weights.tensors, strict=False)  # complete up to tied names: check_tensors saw to it
    network.eval()
    if classes is None:
        classes = count_outputs(network, input_shape, input_dtype, path)
    return LoadedCheckpoint(
        network, spec, tuple(input_shape), input_dtype, classes, weights.digest, weights.files, weights.tensors
    )


def save_checkpoint(path: Path, model: nn.Module, metadata: CheckpointMetadata, force: bool) -> None:
    """Write a network's parameters and buffers as safetensors, atomically.

    Raises: InputError: the file exists and not `force`, or a state that is no tensor of a type we store.
    """
    arrays = state_arrays(model)
    with atomic_file(path, force) as temporary:
        save_arrays(temporary, arrays, dump_metadata(metadata))


def state_arrays(model: nn.Module) -> dict[str, Array]:
    """Parameters and buffers by their state-dict names, as arrays of the same type and bits."""
    return {name: to_array(tensor, name) for name, tensor in model.state_dict().items()}


def to_array(tensor: Any, name: str) -> Array:
    """A tensor as an array; bfloat16 and float8 by way of their bits. Raises: InputError: it is no plain tensor."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_complex():
        raise InputError(f"{name!r} in the model's state is not a plain tensor, so safetensors cannot hold it.")
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype in NAMES_AND_BITS:
        bits, dtype = NAMES_AND_BITS[plain.dtype]
        return plain.view(bits).numpy().view(dtype)
    return plain.numpy()


def to_tensor(array: Array) -> torch.Tensor:
    """The inverse of `to_array`; shares the array's memory."""
    if array.dtype in FROM_NUMPY:
        bits, dtype = FROM_NUMPY[array.dtype]
        return torch.from_numpy(array.view(np.dtype(str(bits).removeprefix("torch.")))).view(dtype)
    return torch.from_numpy(array)


def read_weights(path: Path) -> Weights:
    """The tensors in a `.safetensors`, `.pt` or `.pth` file, or in shards.

    Raises: InputError: damaged, or not such a file.
    """
    if path.suffix in PYTORCH_SUFFIXES:
        tensors = read_state_dict(path)
        digest = arrays_digest({name: to_array(t, name) for name, t in tensors.items()})
        return Weights(tensors, None, digest, (path,))
    with open_checkpoint(path) as file:
        metadata = metadata_or_none(file, CheckpointMetadata)
        tensors = {name: to_tensor(file.read_rows(name, 0, info.rows)) for name, info in file.tensors.items()}
        return Weights(tensors, metadata, content_digest(file), files_of(file))


def check_tensors(path: Path, found: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Compare a file's tensors with those that the model has, by name, shape and kind of number.

    Of parameters that a model ties together, one name is enough.
    Raises: InputError: the first three that differ.
    """
    expected = model.state_dict(keep_vars=True)
    present = {id(tensor) for name, tensor in expected.items() if name in found}
    missing = [name for name, tensor in expected.items() if name not in found and id(tensor) not in present]
    unexpected = [name for name in found if name not in expected]
    wrong = [
        f"{name!r} is {description(found[name])}, expected {description(tensor)}"
        for name, tensor in expected.items()
        if name in found and description(found[name]) != description(tensor)
    ]
    faults = [
        f"misses {some([f'{name!r} {description(expected[name])}' for name in missing])}" if missing else "",
        f"has unexpected {some([f'{name!r} {description(found[name])}' for name in unexpected])}" if unexpected else "",
        some(wrong) if wrong else "",
    ]
    if any(faults):
        raise InputError(
            f"{path} does not fit the model: {'; '.join(filter(None, faults))}.\n{advice(missing, unexpected)}"
        )


def description(tensor: torch.Tensor) -> str:
    """'64x3x3x3', with the type added where it is not floating."""
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return shape if tensor.is_floating_point() else f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def some(texts: list[str]) -> str:
    """Up to three of them, and how many more there are."""
    more = f" and {len(texts) - MOST_NAMED} more" if len(texts) > MOST_NAMED else ""
    return ", ".join(texts[:MOST_NAMED]) + more


def advice(missing: list[str], unexpected: list[str]) -> str:
    """What to do about tensors that do not match."""
    for prefix in ("module.", "_orig_mod.", "model."):
        if missing and unexpected and {prefix + name for name in missing} & set(unexpected):
            return f"Its names start with {prefix!r}: save the state dict of the network inside the wrapper."
    return "Check --model, --model-arg, --input-shape and --classes, or pass the checkpoint that they belong to."


def check_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises: InputError: a weight is NaN or Inf."""
    for name, tensor in tensors.items():
        # float8 has no isfinite of its own
        wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
        if not torch.isfinite(wide).all():
            raise InputError(f"{path}: tensor {name!r} holds NaN or Inf. Train again, or use an earlier checkpoint.")


def count_outputs(model: nn.Module, input_shape: tuple[int, ...], input_dtype: InputDtype, path: Path) -> int:
    """The number of logits that the network gives for one sample of zeros. Raises: InputError: it does not run."""
    try:
        with torch.inference_mode():
            return logits_of(model(torch.zeros(1, *input_shape, dtype=torch_type(input_dtype)))).shape[-1]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InputError(
            f"{path}: the model does not run on a sample of {'x'.join(map(str, input_shape))}, so its classes cannot "
            "be counted. Check --input-shape and --input-dtype, or pass --classes N."
        ) from error
