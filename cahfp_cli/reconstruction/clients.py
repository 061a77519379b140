"""Read what each client sent back, and check it completely against the global checkpoint, before anything is written.

A submodel folder holds `submodel.safetensors` and `index_map.safetensors`, and may hold `report.json`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cahfp_cli.checkpoint import strict_json
from cahfp_cli.checkpoint.digest import content_digest, row_blocks
from cahfp_cli.checkpoint.dtypes import FLOATS, raw_bytes
from cahfp_cli.checkpoint.metadata import SubmodelMetadata, read_metadata
from cahfp_cli.checkpoint.safetensors_file import SafetensorsFile, is_size, open_safetensors
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.pruning.files import INDEX_MAP, REPORT, TENSORS
from cahfp_cli.pruning.index_map import IndexMap, check_against, listed, read_index_map

MAX_REPORT_BYTES = 16_000_000
LEAST_WEIGHT, GREATEST_WEIGHT = 1e-9, 1e15  # sums and quotients of weights in this range neither overflow nor vanish


@dataclass(frozen=True)
class Client:
    """One validated submodel folder. `weight` is the client's n_k; `file` is closed and reopens itself to be read."""

    folder: Path
    weight: float
    file: SafetensorsFile
    index_map: IndexMap
    order: tuple[str, str, float]
    """Content before names, so that the result does not depend on how clients are listed or what they are called."""

    def covers(self, name: str) -> bool:
        return name in self.index_map.tensors


def check_checkpoint(file: SafetensorsFile) -> None:
    """Check the numbers of a global checkpoint.

    Raises: InputError: a float is NaN or infinite, or a running variance is negative.
    """
    _check_numbers(file)


def read_clients(
    checkpoint: SafetensorsFile, digest: str, folders: Sequence[Path], weights: Mapping[Path, float]
) -> tuple[list[Client], list[str]]:
    """Read and check all clients; returns them in an order that depends on their content only, and warnings.

    Args: digest: content digest of `checkpoint`; weights: by folder, what takes precedence over recorded num_examples.
    Raises: UsageError: no folder, a folder twice, a weight for a folder not listed or one that is not a positive
        number. InputError: a folder is not a sound submodel of `checkpoint`, or only some have a num_examples.
    """
    _check_folders(folders)
    given = _by_folder(folders, weights)
    examples: dict[Path, float | None] = {}
    parts = []
    for folder in folders:
        file, index_map, metadata = _read_client(checkpoint, digest, folder)
        parts.append((folder, file, index_map))
        examples[folder] = given.get(folder) or metadata.num_examples or _reported_examples(folder)
        if (examples[folder] or 0) > GREATEST_WEIGHT:
            raise InputError(
                f"{folder}: its num_examples is larger than {GREATEST_WEIGHT:g}; pass --weight {folder}=N."
            )
    found, warnings = _client_weights(examples)
    clients = [
        Client(folder, found[folder], file, index_map, (content_digest(file), _map_key(index_map), found[folder]))
        for folder, file, index_map in parts
    ]
    return sorted(clients, key=lambda client: (client.order, str(client.folder))), warnings


def _map_key(index_map: IndexMap) -> str:
    """sha256 of the indices and factors of all tensors and axes, whatever the file that they came in."""
    digest = hashlib.sha256()
    for name, entry in sorted(index_map.tensors.items()):
        whole = [indices is None for indices in entry.axes]
        digest.update(json.dumps([name, entry.submodel_shape, whole]).encode())
        for indices in entry.axes:
            digest.update(b"" if indices is None else raw_bytes(indices))
        if entry.factors:
            digest.update(json.dumps({"factors": [along is not None for along in entry.factors]}).encode())
        for along in entry.factors:
            digest.update(b"" if along is None else raw_bytes(along))
    return digest.hexdigest()


def _check_folders(folders: Sequence[Path]) -> None:
    if not folders:
        raise UsageError("no submodel folder is given; name at least one.")
    seen: dict[Path, Path] = {}
    for folder in folders:
        first = seen.setdefault(folder.resolve(), folder)
        if first is not folder:
            raise UsageError(f"{folder}: this folder is listed twice; name each client once.")


def _by_folder(folders: Sequence[Path], weights: Mapping[Path, float]) -> dict[Path, float]:
    listed_as = {folder.resolve(): folder for folder in folders}
    result = {}
    for folder, weight in weights.items():
        if folder.resolve() not in listed_as:
            raise UsageError(f"--weight names {folder}, which is not one of the submodel folders.")
        if not LEAST_WEIGHT <= weight <= GREATEST_WEIGHT:
            raise UsageError(
                f"--weight {folder}={weight}: a weight is a number from {LEAST_WEIGHT:g} to {GREATEST_WEIGHT:g}."
            )
        result[listed_as[folder.resolve()]] = float(weight)
    return result


def _client_weights(examples: Mapping[Path, float | None]) -> tuple[dict[Path, float], list[str]]:
    lacking = [folder for folder, count in examples.items() if count is None]
    if len(lacking) == len(examples):
        warning = "no submodel records num_examples, so all clients count the same; pass --weight DIR=N to weigh them."
        return dict.fromkeys(examples, 1.0), [warning] if len(examples) > 1 else []
    if lacking:
        raise InputError(
            f"{lacking[0]}: it records no num_examples, while other clients do.\n"
            f"Pass --weight {lacking[0]}=N with the number of examples that it was trained on."
        )
    return {folder: float(count) for folder, count in examples.items() if count is not None}, []


def _reported_examples(folder: Path) -> int | None:
    path = folder / REPORT
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            text = file.read(MAX_REPORT_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    if len(text) > MAX_REPORT_BYTES:
        raise InputError(f"{path}: it is larger than any report of ours; pass --weight {folder}=N and remove it.")
    try:
        report: Any = strict_json.parse(text)
    except ValueError as error:
        raise InputError(f"{path}: {error}.\nMake the report again, or pass --weight {folder}=N.") from None
    count = report.get("num_examples") if isinstance(report, dict) else None
    if count is not None and not (is_size(count) and count > 0):
        raise InputError(f"{path}: num_examples must be a positive integer; pass --weight {folder}=N.")
    return count


def _read_client(
    checkpoint: SafetensorsFile, digest: str, folder: Path
) -> tuple[SafetensorsFile, IndexMap, SubmodelMetadata]:
    if not folder.is_dir():
        raise InputError(f"{folder}: it is not a folder; a submodel folder, as `cahfp prune` writes it, is expected.")
    index_map = read_index_map(folder / INDEX_MAP)
    with open_safetensors(folder / TENSORS) as file:
        metadata = read_metadata(file, SubmodelMetadata)
        for path, belongs_to in ((folder / INDEX_MAP, index_map.checkpoint), (file.path, metadata.checkpoint)):
            if belongs_to != digest:
                raise InputError(
                    f"{path}: it belongs to another checkpoint (digest {belongs_to[:12]}..., not {digest[:12]}...).\n"
                    f"Prune again from {checkpoint.path}, or pass the checkpoint it was made from."
                )
        try:
            check_against(index_map, checkpoint)
        except InputError as error:
            raise InputError(f"{folder / INDEX_MAP}: it does not fit the checkpoint. {error}") from None
        _check_tensors(file, index_map)
        _check_numbers(file)
    return file, index_map, metadata


def _check_tensors(file: SafetensorsFile, index_map: IndexMap) -> None:
    missing = sorted(index_map.tensors.keys() - file.tensors.keys())
    extra = sorted(file.tensors.keys() - index_map.tensors.keys())
    for fault, names in (("lacks", missing), ("has, beyond its index map,", extra)):
        if names:
            raise InputError(
                f"{file.path}: it {fault} {listed(names)}.\n"
                "Send back the submodel with the same tensors as `cahfp prune` wrote it."
            )
    for name, entry in index_map.tensors.items():
        info = file.tensors[name]
        if (info.shape, info.dtype) != (entry.submodel_shape, entry.dtype):
            raise InputError(
                f"{file.path}: tensor {shown(name)} is {info.dtype} {list(info.shape)}, but its index map says "
                f"{entry.dtype} {list(entry.submodel_shape)}.\nSend back the tensors with unchanged shapes and dtypes."
            )


def _check_numbers(file: SafetensorsFile) -> None:
    for name, info in file.tensors.items():
        if info.dtype not in FLOATS:
            continue
        is_variance = name.rpartition(".")[2] == "running_var"
        for first, last in row_blocks(info):
            block = file.read_rows(name, first, last)
            with np.errstate(invalid="ignore"):  # of a signalling NaN in bfloat16
                is_finite = bool(np.all(np.isfinite(block)))
            if not is_finite:
                raise InputError(
                    f"{file.path}: tensor {shown(name)} holds NaN or infinite numbers; "
                    "train it again (a smaller learning rate may help) or leave this file out."
                )
            if is_variance and np.any(block < 0):
                raise InputError(f"{file.path}: tensor {shown(name)} holds a negative variance; train it again.")
