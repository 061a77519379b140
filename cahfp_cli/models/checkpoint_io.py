"""Checkpoints to networks and back: our safetensors files, other people's, and plain PyTorch state dicts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cahfp_cli.checkpoint.atomic import atomic_file
from cahfp_cli.checkpoint.digest import content_digest
from cahfp_cli.checkpoint.fitting import Fitted, beginnings, fit, under
from cahfp_cli.checkpoint.in_memory import TensorsInMemory
from cahfp_cli.checkpoint.metadata import (
    CheckpointMetadata,
    InputDtype,
    ModelSpec,
    Scalar,
    dump_metadata,
    metadata_or_none,
)
from cahfp_cli.checkpoint.safetensors_file import is_pytorch
from cahfp_cli.checkpoint.sharded import Tensors, files_of, open_checkpoint
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError, UsageError, first_line
from cahfp_cli.models.inputs import torch_type
from cahfp_cli.models.outputs import logits_of
from cahfp_cli.models.pytorch_file import read_state_dict
from cahfp_cli.models.skeleton import outline
from cahfp_cli.models.spec import build, resolve_spec
from cahfp_cli.models.tensors import (
    dtype_name,
    is_constant,
    is_finite,
    load_state,
    saved_state,
    state_arrays,
    to_tensor,
    unsaved_state,
)
from cahfp_cli.models.undisturbed import undisturbed

MOST_NAMED = 3


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint as a network.

    model: in evaluation mode, on the CPU; its dtypes are the network's own (weights of another floating type in the
    file were converted). input_shape, input_dtype: of one sample. digest: of the file's tensors, see `content_digest`.
    files: what was read, several for shards. tensors: those of the file, in its own dtypes; of tied parameters it may
    hold one name only. remarks: what of the file is not taken, and of the network's state not kept, in sentences.
    """

    model: nn.Module
    spec: ModelSpec
    input_shape: tuple[int, ...]
    input_dtype: InputDtype
    classes: int
    digest: str
    files: tuple[Path, ...]
    tensors: dict[str, torch.Tensor]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Weights:
    """An open checkpoint: its tensors, the files that they are in, and what was passed by, in sentences."""

    file: Tensors
    files: tuple[Path, ...]
    remarks: tuple[str, ...] = ()


def load_checkpoint(
    path: Path,
    *,
    model: str | None = None,
    model_args: Mapping[str, Scalar] | None = None,
    input_shape: tuple[int, ...] | None = None,
    input_dtype: InputDtype | None = None,
    dtype_of_data: InputDtype | None = None,
    classes: int | None = None,
    key: str | None = None,
) -> LoadedCheckpoint:
    """Build the network of a checkpoint and put its weights in.

    What is given here goes before what the file records; a file of someone else's records nothing. For `key` see
    `open_weights`, for names of a wrapper and missing batch counters checkpoint/fitting.py. `classes` may be missing
    for a factory that does not ask for it: then the network's output tells. Where nobody says of which type the
    samples are, it is that of the data at hand, `dtype_of_data`, or float32.
    Raises: UsageError: the model, input shape or classes are neither given nor recorded, or the file names code to
        run; InputError: the file is damaged, or its tensors are not finite or not those of the model.
    """
    with open_weights(path, key) as weights:
        file = weights.file
        recorded = metadata_or_none(file, CheckpointMetadata)
        spec = resolve_spec(model, model_args or {}, recorded.model if recorded else None, path)
        input_shape = input_shape or (recorded.input_shape if recorded else None)
        if input_shape is None:
            raise UsageError(f"{path} records no input shape: pass --input-shape, such as 3x32x32.")
        input_dtype = input_dtype or (recorded.input_dtype if recorded else None) or dtype_of_data or "float32"
        classes = classes or (recorded.classes if recorded else None)
        # A lying file could ask for a network of any size: compare shapes before memory is spent on it.
        bare = outline(spec, input_shape, classes)
        if bare is not None:
            check_tensors(path, read_tensors(fit(file, saved_state(bare))), bare)
        network = build(spec, input_shape, classes)
        fitted = fit(file, saved_state(network))
        tensors = read_tensors(fitted)
        check_tensors(path, tensors, network)
        check_finite(path, tensors, network)
        digest = content_digest(fitted)
    put_in(path, tensors, network)
    network.eval()
    if classes is None:
        classes = count_outputs(network, input_shape, input_dtype, path)
    left_out = fitted.left_out if isinstance(fitted, Fitted) else ()
    remarks = [f"{path}: left out, being no part of the network: {some(left_out)}"] if left_out else []
    return LoadedCheckpoint(
        network,
        spec,
        tuple(input_shape),
        input_dtype,
        classes,
        digest,
        weights.files,
        tensors,
        (*weights.remarks, *remarks, *unsaved_remarks(network)),
    )


def put_in(path: Path, tensors: Mapping[str, torch.Tensor], network: nn.Module) -> None:
    """Put a file's tensors into the network that they fit (see `check_tensors`).

    Raises: InputError: the network's own hooks do not take what its state dict gives.
    """
    for tensor in saved_state(network).values():
        if any(step == 0 and length > 1 for step, length in zip(tensor.stride(), tensor.shape, strict=True)):
            tensor.data = tensor.data.contiguous()  # expanded: several entries in one place cannot be written
    try:
        # complete up to tied names: check_tensors saw to it
        unexpected = load_state(network, tensors)
    except Exception as error:  # whatever its hooks raise
        raise InputError(f"{path}: the model does not load its own state: {first_line(error)}") from error
    if unexpected:
        raise InputError(f"{path}: the model does not load {unexpected[0]!r}, which its own state dict has.")


def save_checkpoint(path: Path, model: nn.Module, metadata: CheckpointMetadata, force: bool) -> None:
    """Write a network's parameters and buffers as safetensors, atomically.

    Raises: InputError: the file exists and not `force`, or a state that is no tensor of a type we store.
    """
    arrays = state_arrays(model)
    with atomic_file(path, force) as temporary:
        save_arrays(temporary, arrays, dump_metadata(metadata))


@contextmanager
def open_weights(path: Path, key: str | None = None) -> Iterator[Weights]:
    """The tensors of a checkpoint, whatever its name: a safetensors file or shards of them, or what `torch.save` wrote.

    Args: key: of a file with several state dicts, the one to take; of one with several networks' tensors, what their
        names start with.
    Raises: InputError: damaged, or not such a file; UsageError: `key` is not there, or is needed.
    """
    if is_pytorch(path):
        state = read_state_dict(path, key)
        file = TensorsInMemory(path, state.arrays, {})
        remarks = [f"{path}: it also holds {some(state.others)}, which --key would take"] if state.others else []
        remarks += [f"{path}: left out, being no tensor: {some(state.left_out)}"] if state.left_out else []
        yield Weights(file if key in (None, state.key) else part_of(file, key), (path,), tuple(remarks))
        return
    with open_checkpoint(path) as stored:
        yield Weights(stored if key is None else part_of(stored, key), files_of(stored))


def part_of(file: Tensors, key: str) -> Tensors:
    """The tensors whose names start with `key`, without it. Raises: UsageError: there are none."""
    part = under(file, key)
    if part is None:
        there = beginnings(file.tensors)
        starts = f"They start with {some(there)}." if there else "They have no common beginnings."
        raise UsageError(f"{file.path}: it holds no state dict {key!r}, and no tensor's name starts so. {starts}")
    return part


def read_tensors(file: Tensors) -> dict[str, torch.Tensor]:
    """All of them. Raises: InputError: one of a type that torch does not have; see also `SafetensorsFile.read_rows`."""
    tensors = {}
    for name, info in file.tensors.items():
        try:
            tensors[name] = to_tensor(file.read_rows(name, 0, info.rows))
        except InputError as error:
            raise InputError(f"{file.path}: tensor {shown(name)}: {error}") from None
    return tensors


def check_tensors(path: Path, found: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Compare a file's tensors with those that the model has, by name, shape and kind of number.

    Of parameters that a model ties together, one name is enough.
    Raises: InputError: the first three that differ.
    """
    expected = saved_state(model)
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
            f"{path} does not fit the model: {'; '.join(filter(None, faults))}.\n"
            "Check --model, --model-arg, --input-shape and --classes, or pass the checkpoint that they belong to."
        )


def description(tensor: torch.Tensor) -> str:
    """'64x3x3x3', with the type added where it is not floating."""
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return shape if tensor.is_floating_point() else f"{shape} {dtype_name(tensor.dtype)}"


def some(texts: Sequence[str]) -> str:
    """Up to three of them, each of a length for a message, and how many more there are."""
    more = f" and {len(texts) - MOST_NAMED} more" if len(texts) > MOST_NAMED else ""
    return ", ".join(texts[:MOST_NAMED]) + more


def unsaved_remarks(network: nn.Module) -> tuple[str, ...]:
    """What a command says of state that files cannot keep."""
    unsaved = unsaved_state(network)
    return (f"not saved, being no tensor: {some(unsaved)} of the model's state",) if unsaved else ()


def check_finite(path: Path, tensors: Mapping[str, torch.Tensor], network: nn.Module) -> None:
    """Numbers must be finite, but for constants that the network's factory makes so, as a mask of minus infinity is.

    Args: network: before the tensors are put in.
    Raises: InputError: a weight, a statistic, or what is no such constant is NaN or Inf.
    """
    made = saved_state(network)
    for name, tensor in tensors.items():
        if not is_finite(tensor).all() and not is_constant(tensor, made[name]):
            raise InputError(f"{path}: tensor {name!r} holds NaN or Inf. Train again, or use an earlier checkpoint.")


def count_outputs(model: nn.Module, input_shape: tuple[int, ...], input_dtype: InputDtype, path: Path) -> int:
    """The number of logits that the network gives for one sample of zeros. Raises: InputError: it does not run."""
    try:
        with undisturbed(model), torch.inference_mode():
            return logits_of(model(torch.zeros(1, *input_shape, dtype=torch_type(input_dtype)))).shape[-1]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InputError(
            f"{path}: the model does not run on a sample of {'x'.join(map(str, input_shape))}, so its classes cannot "
            "be counted. Check --input-shape and --input-dtype, or pass --classes N."
        ) from error
