"""Checkpoints in several safetensors files beside an index, `model.safetensors.index.json`, as model hubs keep them.

The index is JSON: `weight_map` from tensor names to file names, and `metadata`. All shards lie in the index's folder.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from cahfp_cli.checkpoint import strict_json
from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.checkpoint.safetensors_file import SafetensorsFile, TensorInfo, open_safetensors
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.checkpoint.writer import TensorSpec, write_safetensors
from cahfp_cli.errors import InputError

INDEX = "model.safetensors.index.json"
SUFFIX = ".index.json"
MAX_INDEX_BYTES = 100_000_000
MAX_SHARDS = 10_000


class Tensors(Protocol):
    """Named tensors that are read a few rows at a time: of one file, or of the shards of a checkpoint."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def read_rows(self, name: str, first: int, last: int) -> Array: ...


@dataclass(frozen=True)
class ShardedCheckpoint:
    """A validated index and its validated shards, by file name; `metadata` is that of the first shard.

    The shards are closed and open themselves to be read, so that there may be many.
    """

    path: Path
    index: dict[str, Any]
    shards: dict[str, SafetensorsFile]
    tensors: dict[str, TensorInfo]
    shard_of: dict[str, str]

    @property
    def metadata(self) -> dict[str, str]:
        return next(iter(self.shards.values())).metadata

    def read_rows(self, name: str, first: int, last: int) -> Array:
        """See `SafetensorsFile.read_rows`."""
        if name not in self.shard_of:
            raise InputError(f"{self.path}: it has no tensor {shown(name)}.")
        return self.shards[self.shard_of[name]].read_rows(name, first, last)

    def __enter__(self) -> "ShardedCheckpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held open."""


def open_checkpoint(path: Path) -> SafetensorsFile | ShardedCheckpoint:
    """Open a safetensors file, an index of shards, or the folder that such an index lies in.

    Raises: InputError: as `open_safetensors`, for each shard; an index that is damaged or does not say where each
        tensor is.
    """
    if path.is_dir() and (path / INDEX).exists():
        return _open_sharded(path / INDEX)
    return _open_sharded(path) if path.name.endswith(SUFFIX) else open_safetensors(path)


def is_sharded(path: Path) -> bool:
    """Whether `open_checkpoint` would look for an index of shards there."""
    return path.name.endswith(SUFFIX) or (path.is_dir() and (path / INDEX).exists())


def files_of(checkpoint: SafetensorsFile | ShardedCheckpoint) -> tuple[Path, ...]:
    """All files that the checkpoint is in."""
    if isinstance(checkpoint, ShardedCheckpoint):
        return (checkpoint.path, *(shard.path for shard in checkpoint.shards.values()))
    return (checkpoint.path,)


def write_like(
    checkpoint: Tensors,
    target: Path,
    blocks: Callable[[TensorSpec], Iterator[Array]],
    metadata: Mapping[str, str],
) -> None:
    """Write a checkpoint of the same tensors in the same files: exactly the file `target`, or into the folder `target`
    the index and the shards, of which the first has `metadata` and the others keep theirs (see atomic.py for safety).

    Args: blocks: as for `write_safetensors`.
    """
    if not isinstance(checkpoint, ShardedCheckpoint):
        write_safetensors(target, _specs(checkpoint), blocks, metadata)
        return
    for number, (name, shard) in enumerate(checkpoint.shards.items()):
        write_safetensors(target / name, _specs(shard), blocks, shard.metadata if number else metadata)
    (target / checkpoint.path.name).write_text(json.dumps(checkpoint.index, indent=2, sort_keys=True) + "\n")


def _specs(file: Tensors) -> list[TensorSpec]:
    return [TensorSpec(info.name, info.dtype, info.shape) for info in file.tensors.values()]


def _open_sharded(path: Path) -> ShardedCheckpoint:
    index = _index(path)
    weight_map: dict[str, str] = index["weight_map"]
    shards: dict[str, SafetensorsFile] = {}
    for name in sorted(set(weight_map.values())):
        with open_safetensors(path.parent / name) as file:
            shards[name] = file
    for name, shard in shards.items():
        for tensor in shard.tensors:
            if weight_map.get(tensor) != name:
                raise InputError(
                    f"{shard.path}: it has tensor {shown(tensor)}, which {path.name} does not place there."
                )
    tensors = {}
    for tensor, name in sorted(weight_map.items()):
        if tensor not in shards[name].tensors:
            raise InputError(f"{path}: it places tensor {shown(tensor)} in {name}, which does not have it.")
        tensors[tensor] = shards[name].tensors[tensor]
    return ShardedCheckpoint(path, index, shards, tensors, weight_map)


def _index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file.")
    index: dict[str, Any] = strict_json.read(
        path,
        MAX_INDEX_BYTES,
        too_large="it is larger than any index of shards.",
        damaged="Copy or make the index again.",
    )
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: it has no weight_map from tensor names to shards.")
    for name in weight_map.values():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise InputError(f"{path}: {shown(str(name))} is not the name of a safetensors file in its own folder.")
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise InputError(f"{path}: it names more than {MAX_SHARDS} shards.")
    return index
