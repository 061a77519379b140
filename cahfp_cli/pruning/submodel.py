"""Submodels: cutting one out of a network, and building one again from its folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.checkpoint.atomic import atomic_directory
from cahfp_cli.checkpoint.dtypes import Array, dtype_code
from cahfp_cli.checkpoint.metadata import SubmodelMetadata, dump_metadata, read_metadata
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.coupling.analysis import Analysis, check_slice
from cahfp_cli.coupling.groups import ChannelGroups
from cahfp_cli.coupling.slicing import slice_module
from cahfp_cli.errors import InputError, VerificationError
from cahfp_cli.export.onnx_file import export_onnx
from cahfp_cli.models.checkpoint_io import check_finite, check_tensors, state_arrays, to_tensor
from cahfp_cli.models.spec import build, resolve_spec
from cahfp_cli.pruning.files import INDEX_MAP, ONNX, REPORT, TENSORS
from cahfp_cli.pruning.index_map import IndexMap, TensorMap, gather, read_index_map, scatter, write_index_map
from cahfp_cli.pruning.report import write_report


@dataclass(frozen=True)
class LoadedSubmodel:
    """A submodel folder as a compact network (evaluation mode, CPU), with what it says of itself."""

    model: nn.Module
    metadata: SubmodelMetadata
    index_map: IndexMap
    folder: Path


def cut(model: nn.Module, analysis: Analysis, kept: NDArray[np.bool_]) -> nn.Module:
    """The compact network of the kept groups, after its plan was checked operator by operator.

    Raises: VerificationError: its operators do not have the planned shapes.
    """
    check_slice(model, analysis, kept)
    return slice_module(model, analysis.groups.indices(kept)).eval()


def make_index_map(model: nn.Module, groups: ChannelGroups, kept: NDArray[np.bool_], checkpoint: str) -> IndexMap:
    """Which entries of every tensor the kept groups hold; `checkpoint` is the content digest of the global one."""
    indices = groups.indices(kept)
    return IndexMap(
        checkpoint,
        {
            name: TensorMap(array.shape, dtype_code(array.dtype), indices[name])
            for name, array in state_arrays(model).items()
        },
    )


def check_round_trip(model: nn.Module, submodel: nn.Module, index_map: IndexMap) -> None:
    """Raise VerificationError unless gathering gives the submodel and scattering gives the checkpoint back, bit by bit."""
    compact = state_arrays(submodel)
    for name, whole in state_arrays(model).items():
        tensor_map = index_map.tensors[name]
        restored = whole.copy()
        gathered = gather(whole, tensor_map)
        scatter(compact[name], tensor_map, restored)
        if not (same_bits(gathered, compact[name]) and same_bits(restored, whole)):
            raise VerificationError(f"the index map of {name!r} does not lead back to the checkpoint")


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays are equal to the last bit, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def write_submodel(
    output: Path,
    model: nn.Module,
    index_map: IndexMap,
    metadata: SubmodelMetadata,
    report: Mapping[str, Any],
    *,
    onnx: bool = True,
    storage_limit: float | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write a submodel folder, all of it or nothing.

    Args:
        output: the folder; replaced if it exists and `force`.
        model: the compact network, on the CPU.
        report: becomes `report.json`, with the ONNX file's size and parity and the provenance added.
        onnx: whether to export and verify `model.onnx`.
        storage_limit: bytes that the ONNX file may have.
    Returns: the report as written.
    Raises: VerificationError: the ONNX file differs from the network, or is larger than the limit.
    """
    written = {**report, "provenance": metadata.provenance.model_dump(mode="json")}
    with atomic_directory(output, force) as folder:
        save_arrays(folder / TENSORS, state_arrays(model), dump_metadata(metadata))
        write_index_map(folder / INDEX_MAP, index_map, metadata.provenance)
        if onnx:
            file = export_onnx(model, metadata.input_shape, folder / ONNX, onnx_metadata(metadata))
            if storage_limit is not None and file.size > storage_limit:
                raise VerificationError(
                    f"{output.name}: the ONNX file has {file.size} bytes, more than the storage budget of "
                    f"{storage_limit:.0f}; nothing was kept. Lower --storage by the difference."
                )
            written["onnx"] = {"bytes": file.size, "parity": file.parity}
        write_report(folder / REPORT, written)
    return written


def load_submodel(folder: Path, model: str | None = None) -> LoadedSubmodel:
    """Build the compact network of a folder: its spec's network, cut by its index map, with its tensors.

    Args:
        model: the spec, where the folder's own names code to run (see models/spec.py).
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
        tensors = {name: to_tensor(file.read(name)) for name in file.tensors}
    if metadata.checkpoint != index_map.checkpoint:
        raise InputError(
            f"{folder}: {TENSORS} and {INDEX_MAP} belong to different checkpoints; run `cahfp prune` again."
        )
    spec = resolve_spec(model, {} if model is None else metadata.model.args, metadata.model, folder / TENSORS)
    network = build(spec, metadata.input_shape, metadata.classes)
    check_map_fits(folder / INDEX_MAP, index_map, network)
    compact = slice_module(network, {name: entry.axes for name, entry in index_map.tensors.items()})
    check_tensors(folder / TENSORS, tensors, compact)
    check_finite(folder / TENSORS, tensors)
    compact.load_state_dict(tensors, strict=False)
    return LoadedSubmodel(compact.eval(), metadata, index_map, folder)


def check_map_fits(path: Path, index_map: IndexMap, network: nn.Module) -> None:
    """Raise InputError unless the map speaks of exactly the network's tensors, with their shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in sorted(shapes.keys() ^ index_map.tensors.keys()):
        raise InputError(f"{path}: {name!r} is in the map or in the network, but not in both: check --model.")
    for name, shape in shapes.items():
        if index_map.tensors[name].shape != shape:
            raise InputError(
                f"{path}: {name!r} has shape {index_map.tensors[name].shape} in the map and {shape} in the network: "
                "check --model."
            )


def onnx_metadata(metadata: SubmodelMetadata) -> dict[str, str]:
    """What an ONNX file says of the submodel in it (`metadata_props`)."""
    return {
        "cahfp.checkpoint": metadata.checkpoint,
        "cahfp.model": metadata.model.model_dump_json(),
        "cahfp.input_shape": "x".join(map(str, metadata.input_shape)),
        "cahfp.profile": metadata.profile or "",
        "cahfp.tool": metadata.provenance.tool,
    }
