"""Submodels: cutting one out of a network, and building one again from its folder."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.checkpoint.atomic import atomic_directory
from cahfp_cli.checkpoint.dtypes import DTYPES, PACKED, Array, dtype_code
from cahfp_cli.checkpoint.metadata import SubmodelMetadata, dump_metadata, read_metadata
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.coupling.adapters import adapt
from cahfp_cli.coupling.calls import SIZES
from cahfp_cli.coupling.copying import copy_with, tensors_of
from cahfp_cli.coupling.groups import ChannelGroups
from cahfp_cli.coupling.meta_run import Subject, forward
from cahfp_cli.coupling.operator_log import OperatorLog
from cahfp_cli.coupling.rewriting import install
from cahfp_cli.coupling.slicing import clone, slice_module, to_meta
from cahfp_cli.errors import InputError, VerificationError, first_line
from cahfp_cli.export.onnx_file import DEFAULTS, ExportOptions, export_onnx
from cahfp_cli.export.quantised import Quantisation, export_quantised
from cahfp_cli.export.side_file import side_files
from cahfp_cli.formats.files import INDEX_MAP, ONNX, QUANTISED, REPORT, TENSORS
from cahfp_cli.formats.gathering import gather, scatter
from cahfp_cli.formats.index_map import BufferMap, IndexMap, TensorMap
from cahfp_cli.formats.index_map_file import read_index_map, write_index_map
from cahfp_cli.formats.report import write_report
from cahfp_cli.formats.rewrites import Rewrite
from cahfp_cli.models.checkpoint_io import check_finite, check_tensors, put_in, read_tensors
from cahfp_cli.models.inputs import torch_type
from cahfp_cli.models.skeleton import outline, skeleton, unsaved_bytes
from cahfp_cli.models.spec import resolve_spec
from cahfp_cli.models.tensors import load_state, saved_state, state_arrays, to_tensor
from cahfp_cli.provenance import portable
from cahfp_cli.pruning.compensation import factors_of_tensors
from cahfp_cli.pruning.ownership import foreign_in_submodel

LEAST_UNSAVED = 1 << 30
"""Bytes of buffers that any network may make."""
M = TypeVar("M", bound=nn.Module)
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class LoadedSubmodel:
    """A submodel folder as a compact network (evaluation mode, CPU), with what it says of itself."""

    model: nn.Module
    tensors: Mapping[str, torch.Tensor]
    metadata: SubmodelMetadata
    index_map: IndexMap
    folder: Path


def make_index_map(
    arrays: Mapping[str, Array],
    groups: ChannelGroups,
    kept: Mask,
    checkpoint: str,
    rewrites: tuple[Rewrite, ...] = (),
    gates: NDArray[np.float64] | None = None,
) -> IndexMap:
    """Which entries of every tensor of a checkpoint the kept groups hold.

    Args:
        arrays: the checkpoint's own tensors, in its own dtypes.
        checkpoint: its content digest.
        rewrites: those that the compact network needs.
        gates: float64 (groups,), folded into the weights that read each group (see pruning/compensation.py).
    Raises: InputError: a tensor of a packed type.
    """
    packed = next((name for name, array in arrays.items() if dtype_code(array.dtype) in PACKED), None)
    if packed is not None:
        raise InputError(
            f"{packed!r} has several numbers in a byte, and is neither cut nor merged: convert it to uint8."
        )
    indices = groups.indices(kept)
    factors = {} if gates is None else factors_of_tensors(groups, kept, gates)
    return IndexMap(
        checkpoint,
        {
            name: TensorMap(
                array.shape, dtype_code(array.dtype), indices.get(name, whole(array)), factors.get(name, ())
            )
            for name, array in arrays.items()  # state that is neither parameter nor buffer stays whole
        },
        {
            name: BufferMap(tuple(len(labels) for labels in axes), indices[name])
            for name, axes in groups.unsaved.items()
        },
        rewrites,
    )


def whole(array: Array) -> tuple[None, ...]:
    """The axes of a tensor that loses nothing."""
    return (None,) * array.ndim


def gather_all(arrays: Mapping[str, Array], index_map: IndexMap) -> dict[str, Array]:
    """The submodel's tensors: bit for bit those of the checkpoint, times the map's factors where it has some.

    Raises: VerificationError: scattering them back does not give the checkpoint.
    """
    compact = {}
    for name, tensor_map in index_map.tensors.items():
        compact[name] = gather(arrays[name], tensor_map)
        restored = arrays[name].copy()
        scatter(compact[name], tensor_map, restored)
        if restored.tobytes() != arrays[name].tobytes():
            raise VerificationError(f"the index map of {name!r} does not lead back to the checkpoint")
    return compact


def with_arrays(model: M, arrays: Mapping[str, Array]) -> M:
    """The compact network with the numbers that its submodel folder holds, in place."""
    load_state(model, {name: to_tensor(array) for name, array in arrays.items()})
    return model


def trained_arrays(model: nn.Module, index_map: IndexMap) -> dict[str, Array]:
    """The tensors of a compact network that was trained, under the names and in the dtypes of the checkpoint."""
    state = state_arrays(model)
    return {name: state[name].astype(DTYPES[entry.dtype]) for name, entry in index_map.tensors.items()}


def write_submodel(
    output: Path,
    model: nn.Module,
    arrays: Mapping[str, Array],
    index_map: IndexMap,
    metadata: SubmodelMetadata,
    report: Mapping[str, Any],
    *,
    onnx: bool = True,
    exporting: ExportOptions = DEFAULTS,
    quantised: Sequence[Quantisation] = (),
    storage_limit: float | None = None,
    write_more: Callable[[Path], None] = lambda folder: None,
    force: bool = False,
) -> dict[str, Any]:
    """Write a submodel folder, all of it or nothing.

    Args:
        output: the folder; replaced if it exists and `force`.
        model: the compact network, on the CPU, for the ONNX file; arrays: its tensors as they are stored.
        report: becomes `report.json`, with the ONNX file's size and parity and the provenance added.
        onnx: whether to export and verify `model.onnx`; exporting: how; quantised: what else to make of that file.
        storage_limit: bytes that the ONNX file may have, with the one beside it where its weights need one.
        write_more: writes what else is to be in the folder, given where it is for now.
    Returns: the report as written.
    Raises: VerificationError: the ONNX file differs from the network or is larger than the limit, or a quantised one
        differs from it.
    """
    written = {**report, "provenance": metadata.provenance.model_dump(mode="json")}
    with atomic_directory(output, force, foreign_in_submodel) as folder:
        save_arrays(folder / TENSORS, arrays, dump_metadata(metadata))
        write_index_map(folder / INDEX_MAP, index_map, metadata.provenance)
        write_more(folder)
        if onnx:
            file = export_onnx(
                model,
                metadata.input_shape,
                folder / ONNX,
                onnx_metadata(metadata),
                dtype=torch_type(metadata.input_dtype),
                options=exporting,
            )
            if storage_limit is not None and file.size > storage_limit:
                raise VerificationError(
                    f"{output.name}: the ONNX file has {file.size} bytes, more than the storage budget of "
                    f"{storage_limit:.0f}; nothing was kept. Lower --storage by the difference."
                )
            written["onnx"] = {"bytes": file.size, "parity": file.parity, "outputs": list(file.outputs)}
            written["onnx"] |= {"left_out": list(file.left_out)} if file.left_out else {}
            beside = side_files(folder / ONNX)
            written["onnx"] |= {"side_file": beside[0].name} if beside else {}
            if quantised:
                written["quantised"] = {
                    wanted.dtype: quantised_report(output.name, folder, wanted) for wanted in quantised
                }
        write_report(folder / REPORT, written)
    return written


def quantised_report(name: str, folder: Path, wanted: Quantisation) -> dict[str, Any]:
    """Write one quantised file of the submodel `name`; its entry in the report."""
    path = folder / QUANTISED[wanted.dtype]
    try:
        file = export_quantised(folder / ONNX, path, wanted)
    except VerificationError as error:
        raise VerificationError(f"{name}: {error}") from None
    entry = {"file": path.name, "bytes": file.size, **asdict(file.comparison), "data": portable(wanted.compared.name)}
    return {**entry, "layout": asdict(wanted.layout)} if wanted.dtype == "int8" else entry


def load_submodel(folder: Path, model: str | nn.Module | None = None) -> LoadedSubmodel:
    """Build the compact network of a folder: its spec's network, cut by its index map, with its tensors.

    Args:
        model: the spec, where the folder's own names code to run (see models/spec.py), or the full network itself, of
            which a copy is cut.
    Raises:
        UsageError: the spec names code and `model` is not given.
        InputError: files are missing or damaged, or do not belong together.
    """
    for name in (TENSORS, INDEX_MAP):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: {name} is missing, so this is not a submodel folder; run `cahfp prune` again.")
    index_map = read_index_map(folder / INDEX_MAP)
    with open_safetensors(folder / TENSORS) as file:
        metadata = read_metadata(file, SubmodelMetadata)
        tensors = read_tensors(file)
    if metadata.checkpoint != index_map.checkpoint:
        raise InputError(
            f"{folder}: {TENSORS} and {INDEX_MAP} belong to different checkpoints; run `cahfp prune` again."
        )
    if isinstance(model, nn.Module):
        network = adapt(clone(model).cpu())
    else:
        network = adapt(named_network(folder, metadata, index_map, model))
    check_map_fits(folder / INDEX_MAP, index_map, network)
    own = tensors_of(network)
    entries: dict[str, TensorMap | BufferMap] = {**index_map.tensors, **index_map.buffers}
    compact = slice_module(network, {name: entry.axes for name, entry in entries.items() if name in own})
    check_tensors(folder / TENSORS, tensors, compact)
    check_finite(folder / TENSORS, tensors, compact)
    compact = copy_with(compact, lambda _, tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    put_in(folder / TENSORS, tensors, compact)
    dtype = torch_type(metadata.input_dtype)
    subject = Subject(network, metadata.input_shape, dtype, False, torch.get_default_dtype())
    install_checked(folder / INDEX_MAP, compact, subject, index_map.rewrites)
    return LoadedSubmodel(compact.eval(), tensors, metadata, index_map, folder)


def named_network(folder: Path, metadata: SubmodelMetadata, index_map: IndexMap, model: str | None) -> nn.Module:
    """The full network that a folder or `model` names, without the memory of its parameters.

    The spec, its arguments and the map come from files: nothing is allocated for them before they fit each other, and
    then for the parameters that the device keeps.
    """
    spec = resolve_spec(model, {} if model is None else metadata.model.args, metadata.model, folder / TENSORS)
    bare = outline(spec, metadata.input_shape, metadata.classes)
    if bare is not None:
        check_map_fits(folder / INDEX_MAP, index_map, bare)
        check_unsaved(folder / INDEX_MAP, index_map, bare)
    return skeleton(spec, metadata.input_shape, metadata.classes)


def install_checked(path: Path, compact: nn.Module, subject: Subject, rewrites: tuple[Rewrite, ...]) -> None:
    """Put a map's rewrites in place. They come from a file, so they may neither break the network nor make it larger:
    a run on meta tensors shows that, where nothing is allocated; a network that reads values is run on real ones. Where
    it refuses our constants whole as well, as one may that looks for the end of each sentence, nothing can be shown.

    Args: subject: the full network.
    Raises: InputError: they do not fit the network's code.
    """
    if not rewrites:
        return
    longest = max(n for tensor in tensors_of(subject.model).values() for n in (0, *tensor.shape))
    sizes = (one for one in rewrites if one.function in SIZES)
    grown = next((one for one in sizes if not -1 <= one.new <= max(one.old, longest)), None)
    if grown is not None:
        raise InputError(f"{path}: its rewrites make {grown.old} into {grown.new}; the map is damaged.")
    try:
        install(compact, rewrites)
        if not runs_on_meta(path, compact, subject):
            forward(subject, clone(compact), subject.modes[0], subject.sample(1))
    except InputError:
        raise
    except Exception as error:  # whatever the network's own code raises
        if not runs_whole(subject):
            return
        raise InputError(f"{path}: its rewrites do not fit the network's code: {first_line(error)}") from error


def runs_on_meta(path: Path, compact: nn.Module, subject: Subject) -> bool:
    """Whether the full network runs on meta tensors; then the compact one must too, and give nothing larger."""
    bare = replace(subject, model=to_meta(subject.model), on_meta=True)
    full, cut_down = OperatorLog(), OperatorLog()
    try:
        forward(bare, bare.model, bare.modes[0], bare.sample(1), full)
    except Exception:  # it reads values, or makes tensors elsewhere
        return False
    forward(bare, to_meta(compact), bare.modes[0], bare.sample(1), cut_down)
    if cut_down.largest() > full.largest():
        raise InputError(f"{path}: its rewrites make the network larger than the full one; the map is damaged.")
    return True


def runs_whole(subject: Subject) -> bool:
    """Whether the full network, with weights of no meaning, runs on constants."""
    full = copy_with(subject.model, lambda _, t: torch.zeros_like(t, device="cpu") if t.is_meta else t)
    try:
        forward(subject, full, subject.modes[0], subject.sample(1))
    except Exception:  # whatever the network's own code raises
        return False
    return True


def check_map_fits(path: Path, index_map: IndexMap, network: nn.Module) -> None:
    """Raise InputError unless the map has the network's tensors and shapes; one name of tied ones will do. Buffers that
    the network does not save are in the map only where they lose entries."""
    expected = saved_state(network)
    mapped = {id(expected[name]) for name in index_map.tensors if name in expected}
    missing = [name for name, tensor in expected.items() if name not in index_map.tensors and id(tensor) not in mapped]
    for name in (*missing, *sorted(index_map.tensors.keys() - expected.keys())):
        raise InputError(f"{path}: {name!r} is in the map or in the network, but not in both: check --model.")
    unsaved = {name: buffer for name, buffer in network.named_buffers() if name not in expected}
    for name in sorted(index_map.buffers.keys() - unsaved.keys()):
        raise InputError(f"{path}: the network makes no buffer {name!r}: check --model.")
    mapped_shapes = {name: entry.shape for name, entry in index_map.tensors.items()}
    mapped_shapes |= {name: entry.shape for name, entry in index_map.buffers.items()}
    for name, mapped_shape in mapped_shapes.items():
        shape = tuple((expected if name in expected else unsaved)[name].shape)
        if mapped_shape != shape:
            raise InputError(
                f"{path}: {name!r} has shape {mapped_shape} in the map and {shape} in the network: check --model."
            )


def check_unsaved(path: Path, index_map: IndexMap, network: nn.Module) -> None:
    """Raises: InputError: the network, of meta tensors, makes buffers that no file holds out of all proportion."""
    stored = sum(
        math.prod(entry.shape) * DTYPES[entry.dtype].itemsize for entry in index_map.tensors.values() if entry.shape
    )
    size = unsaved_bytes(network)
    if size > max(stored, LEAST_UNSAVED):
        raise InputError(f"{path}: the network that it names makes {size} bytes of buffers, which no file holds.")


def onnx_metadata(metadata: SubmodelMetadata) -> dict[str, str]:
    """What an ONNX file says of the submodel in it (`metadata_props`)."""
    spec = metadata.model.model_copy(update={"spec": portable(metadata.model.spec)})
    return {
        "cahfp.checkpoint": metadata.checkpoint,
        "cahfp.model": spec.model_dump_json(),
        "cahfp.input_shape": "x".join(map(str, metadata.input_shape)),
        "cahfp.input_dtype": metadata.input_dtype,
        "cahfp.profile": metadata.profile or "",
        "cahfp.tool": metadata.provenance.tool,
    }
