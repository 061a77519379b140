"""What an upload must pass before anything of it is averaged. Each check is of one client alone, so that leaving a
client out changes nothing for the others."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cahfp_cli.checkpoint.digest import file_sha256, row_blocks
from cahfp_cli.checkpoint.dtypes import FLOATS, INTEGERS, Array, largest, raw_bytes
from cahfp_cli.checkpoint.in_memory import TensorsInMemory
from cahfp_cli.checkpoint.metadata import SubmodelMetadata, read_metadata
from cahfp_cli.checkpoint.safetensors_file import SafetensorsFile, TensorInfo, open_safetensors
from cahfp_cli.checkpoint.sharded import Tensors
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.errors import InputError
from cahfp_cli.formats.axes import Indices, selector
from cahfp_cli.formats.files import INDEX_MAP, TENSORS
from cahfp_cli.formats.index_map import IndexMap, check_against, is_statistic, last_name, listed
from cahfp_cli.formats.index_map_file import read_index_map

MEAN, VARIANCE, COUNTER = "running_mean", "running_var", "num_batches_tracked"
HEADER_BYTES, HEADER_BYTES_A_TENSOR = 1 << 17, 2048
"""What a file may have beside its elements; a header takes thirty times its size once it is parsed."""
MOST_BATCHES = 2**53


Stored = SafetensorsFile | TensorsInMemory


@dataclass(frozen=True)
class Upload:
    """One folder that passed. `sha256` by file name as in the folder; the map's is of the file that was used."""

    file: SafetensorsFile
    index_map: IndexMap
    metadata: SubmodelMetadata
    sha256: dict[str, str]


def check_block(path: Path, info: TensorInfo, block: Array, sent: Callable[[], Array] | None = None) -> None:
    """Of the global checkpoint's rows, or with `sent` of an upload's, for which that gives what was sent out.

    Raises: InputError: rows of a float tensor hold NaN, infinity, or as a running variance a negative number. Constants
        may be infinite, such as the mask of an attention: what is so in the global checkpoint and comes back as it was.
    """
    if info.dtype not in FLOATS:
        return
    with np.errstate(invalid="ignore"):  # of a signalling NaN in bfloat16
        is_sound = np.isfinite(block)
        if not is_sound.all() and not is_statistic(info.name):
            is_sound |= ~np.isnan(block) if sent is None else block == sent()
    if not is_sound.all():
        raise InputError(
            f"{path}: tensor {shown(info.name)} holds NaN or infinite numbers; "
            "train it again (a smaller learning rate may help) or leave this file out."
        )
    if last_name(info.name) == VARIANCE and np.any(block < 0):
        raise InputError(f"{path}: tensor {shown(info.name)} holds a negative variance; train it again.")


def mean_of(variance: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The name of the running mean that belongs to the tensor `variance`, or None if it is no running variance."""
    prefix, dot, last = variance.rpartition(".")
    mean = f"{prefix}{dot}{MEAN}"
    if last != VARIANCE or mean not in tensors:
        return None
    both_float = tensors[mean].dtype in FLOATS and tensors[variance].dtype in FLOATS
    return mean if both_float and tensors[mean].shape == tensors[variance].shape else None


def read_upload(checkpoint: Tensors, digest: str, folder: Path, maps: Path | None) -> Upload:
    """Read and check a submodel folder against the global checkpoint of content digest `digest`.

    Args: maps: folder of the server's own index maps, `NAME/index_map.safetensors` or `NAME.safetensors` for the folder
        NAME; the client's own copy is then not even opened.
    Raises: InputError: anything in it is not as it was sent out, but for the numbers.
    """
    if not folder.exists():
        raise InputError(f"{folder}: there is no such file or folder.")
    if not folder.is_dir():
        raise InputError(f"{folder}: it is not a folder; a submodel folder, as `cahfp prune` writes it, is expected.")
    map_path = map_of(folder, maps)
    index_map = read_index_map(map_path, checkpoint)
    _check_digest(map_path, index_map.checkpoint, digest, checkpoint)
    try:
        check_against(index_map, checkpoint)
    except InputError as error:
        raise InputError(f"{map_path}: it does not fit the checkpoint. {error}") from None
    _check_pairs(folder, index_map, checkpoint)
    elements = sum(
        int(np.prod(entry.submodel_shape, dtype=np.float64)) * checkpoint.tensors[name].itemsize
        for name, entry in index_map.tensors.items()
    )
    room = header_bytes(checkpoint)
    with open_safetensors(folder / TENSORS, elements + room, room) as file:
        metadata = read_metadata(file, SubmodelMetadata)
        _check_digest(file.path, metadata.checkpoint, digest, checkpoint)
        _check_tensors(file, index_map)
        sha256 = file.sha256 = checked_numbers(file, index_map, checkpoint)
    return Upload(file, index_map, metadata, {TENSORS: sha256, INDEX_MAP: file_sha256(map_path)})


def checked_numbers(file: Stored, index_map: IndexMap, checkpoint: Tensors) -> str:
    """Check what is in the tensors of an upload; their names, shapes and dtypes are those of its index map.

    Returns: sha256 of the file, in hexadecimal.
    Raises: InputError: numbers that are not finite, variances that are negative or could not be pooled, counters of
        batches that count none.
    """
    sha256 = _check_contents(file, index_map, checkpoint)
    check_integers(file, index_map, checkpoint)
    check_statistics(file, index_map, checkpoint)
    return sha256


def map_of(folder: Path, maps: Path | None) -> Path:
    """The index map of a submodel folder: its own, or the server's. Raises: InputError: the server has none of it."""
    if maps is None:
        return folder / INDEX_MAP
    name = folder.resolve().name
    places = (maps / name / INDEX_MAP, maps / f"{name}.safetensors")
    for place in places:
        if place.is_file():
            return place
    raise InputError(f"{folder}: {maps} has no index map of it, neither {name}/{INDEX_MAP} nor {name}.safetensors.")


def header_bytes(checkpoint: Tensors) -> int:
    """What a file of these tensors may have beside their elements."""
    return HEADER_BYTES + sum(HEADER_BYTES_A_TENSOR + 4 * len(name) for name in checkpoint.tensors)  # UTF-8


def _check_digest(path: Path, found: str, digest: str, checkpoint: Tensors) -> None:
    if found != digest:
        raise InputError(
            f"{path}: it belongs to another checkpoint (digest {found[:12]}..., not {digest[:12]}...).\n"
            f"Prune again from {checkpoint.path}, or pass the checkpoint it was made from."
        )


def _check_pairs(folder: Path, index_map: IndexMap, checkpoint: Tensors) -> None:
    for name in index_map.tensors:
        mean = mean_of(name, checkpoint.tensors)
        if mean is not None:
            pairs = zip(index_map.tensors[mean].axes, index_map.tensors[name].axes, strict=True)
            if not all(_same_indices(left, right) for left, right in pairs):
                raise InputError(
                    f"{folder}: its index map keeps other channels of {shown(mean)} than of {shown(name)}; "
                    "it is damaged: prune again."
                )


def _same_indices(left: Indices | None, right: Indices | None) -> bool:
    if left is None or right is None:
        return left is right
    return np.array_equal(left, right)


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


def _check_contents(file: Stored, index_map: IndexMap, checkpoint: Tensors) -> str:
    """Check all numbers, and return the sha256 of the file's bytes: one pass serves both."""

    def sent(name: str, first: int, last: int) -> Array:
        info = checkpoint.tensors[name]
        own = checkpoint.read_rows(name, 0, info.rows)[selector(index_map.tensors[name].axes, info.shape)]
        return own[first:last] if own.ndim else own

    digest = hashlib.sha256(file.read_header())
    for info in sorted(file.tensors.values(), key=lambda info: info.start):
        for first, last in row_blocks(info):
            block = file.read_rows(info.name, first, last)
            digest.update(raw_bytes(block))
            check_block(file.path, info, block, partial(sent, info.name, first, last))
    return digest.hexdigest()


def check_integers(file: Tensors, index_map: IndexMap, checkpoint: Tensors) -> None:
    """Training may change integers and flags: they count steps, or say what has happened. A batch counter must be one.
    What is neither that nor averaged, such as a complex number, must be as it was sent out."""
    for name, entry in index_map.tensors.items():
        info = checkpoint.tensors[name]
        if info.dtype in FLOATS or (info.dtype in INTEGERS and last_name(name) != COUNTER):
            continue
        found = file.read_rows(name, 0, file.tensors[name].rows)
        if info.dtype in INTEGERS:
            if np.any(found < 0) or np.any(found > MOST_BATCHES):
                raise InputError(f"{file.path}: tensor {shown(name)} counts no batches; train it again.")
            continue
        sent = checkpoint.read_rows(name, 0, info.rows)[selector(entry.axes, info.shape)]
        if raw_bytes(found) != raw_bytes(sent):
            raise InputError(
                f"{file.path}: tensor {shown(name)} differs from the global checkpoint's, and {info.dtype} is not "
                "merged.\nSend it back as it was, or leave this client out."
            )


def check_statistics(file: Tensors, index_map: IndexMap, checkpoint: Tensors) -> None:
    """Pooling variances squares the distances between means, so that one client's mean could make the result too large
    for its dtype. The distance between two clients is at most twice the larger of theirs to the global mean."""
    for name, entry in index_map.tensors.items():
        mean = mean_of(name, checkpoint.tensors)
        if mean is None:
            continue
        rows = file.tensors[name].rows
        own, variance = (file.read_rows(tensor, 0, rows).astype(np.float64) for tensor in (mean, name))
        info = checkpoint.tensors[mean]
        sent = checkpoint.read_rows(mean, 0, info.rows)[selector(entry.axes, info.shape)].astype(np.float64)
        with np.errstate(over="ignore"):
            most = 4 * (own - sent) ** 2 + variance
        if np.any(most > largest(entry.dtype)):
            raise InputError(
                f"{file.path}: pooled around its running mean, tensor {shown(name)} has numbers too large for "
                f"{entry.dtype}; train it again."
            )
