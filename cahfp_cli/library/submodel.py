"""A compact network that is trained in any way, and its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.checkpoint.metadata import SubmodelMetadata
from cahfp_cli.export.onnx_file import DEFAULTS, Exported, ExportOptions
from cahfp_cli.export.onnx_file import export_onnx as export_file
from cahfp_cli.export.quantised import Quantisation
from cahfp_cli.formats.files import REPORT
from cahfp_cli.formats.index_map import IndexMap
from cahfp_cli.formats.report import read_report
from cahfp_cli.library.network import Network
from cahfp_cli.models.inputs import torch_type
from cahfp_cli.models.tensors import same_numbers, saved_state, to_tensor
from cahfp_cli.provenance import provenance
from cahfp_cli.pruning.submodel import load_submodel as load_folder
from cahfp_cli.pruning.submodel import onnx_metadata, trained_arrays, write_submodel


@dataclass(frozen=True, eq=False)
class Submodel:
    """A compact network with what its folder holds.

    model: an ordinary module: train it with any optimiser, loss and loop. index_map: which entries of the checkpoint it
    holds. report: costs, widths, accuracy. arrays: its tensors as they were cut, in the checkpoint's dtypes.
    exporting: how its ONNX file is written. storage_limit: bytes that this file may have.
    """

    model: nn.Module
    index_map: IndexMap
    metadata: SubmodelMetadata
    report: Mapping[str, Any]
    arrays: Mapping[str, Array]
    exporting: ExportOptions = DEFAULTS
    storage_limit: float | None = None


def load_submodel(folder: Path | str, model: str | nn.Module | None = None) -> Submodel:
    """Read a submodel folder.

    Args: model: the spec of its network, where the folder names code to run, or the full network itself.
    Raises: UsageError, InputError: see pruning/submodel.py.
    """
    loaded = load_folder(Path(folder), model)
    path = Path(folder) / REPORT
    report = read_report(path) if path.is_file() else {}
    arrays = {name: np.array(array) for name, array in trained_arrays(loaded.model, loaded.index_map).items()}
    return Submodel(loaded.model, loaded.index_map, loaded.metadata, report, arrays)


def save_submodel(
    submodel: Submodel,
    folder: Path | str,
    *,
    examples: int | None = None,
    onnx: bool = True,
    quantised: Sequence[Quantisation] = (),
    force: bool = False,
) -> dict[str, Any]:
    """Write a submodel folder, which `reconstruct` merges: the network as it is by now, its index map, its report.

    Args:
        examples: samples that it was trained on, by which it is weighted when it is merged.
        onnx: whether to write and verify `model.onnx`; quantised: what else to make of that file.
        force: replace the folder if it exists.
    Returns: the report as written.
    Raises: InputError: the folder exists and not `force`, or the network has not the tensors that it was cut with;
        VerificationError: see `write_submodel`.
    """
    metadata, report = submodel.metadata, dict(submodel.report)
    if examples is not None:
        origin = provenance("train", {}, ())
        metadata = metadata.model_copy(update={"num_examples": examples, "provenance": origin})
        report["num_examples"] = examples
    was_training = submodel.model.training
    try:
        return write_submodel(
            Path(folder),
            submodel.model.cpu().eval(),
            current_arrays(submodel),
            submodel.index_map,
            metadata,
            report,
            onnx=onnx,
            exporting=submodel.exporting,
            quantised=quantised,
            storage_limit=submodel.storage_limit,
            force=force,
        )
    finally:
        submodel.model.train(was_training)


def current_arrays(submodel: Submodel) -> dict[str, Array]:
    """The tensors of a submodel in the dtypes of the checkpoint: where nothing has changed since it was cut, with the
    bits of the checkpoint, which the network's own dtype may not hold."""
    now, state = trained_arrays(submodel.model, submodel.index_map), saved_state(submodel.model)
    found = {}
    for name, array in now.items():
        cut = submodel.arrays[name]
        held = to_tensor(np.array(cut)).to(state[name].dtype)
        found[name] = cut if same_numbers(held, state[name].detach().cpu()) else array
    return found


def export_onnx(source: Submodel | Network, path: Path | str, options: ExportOptions | None = None) -> Exported:
    """Write a network as an ONNX file and verify it.

    Raises: VerificationError: the file computes something else; InputError: it cannot be exported, by name of operator.
    """
    about = source.metadata if isinstance(source, Submodel) else source
    extra = onnx_metadata(source.metadata) if isinstance(source, Submodel) else {}
    chosen = options or (source.exporting if isinstance(source, Submodel) else DEFAULTS)
    dtype = torch_type(about.input_dtype)
    return export_file(source.model, about.input_shape, Path(path), extra, dtype=dtype, options=chosen)
