"""Partial aggregates: what a region's clients come to together, to be merged further up like one more client.

`NAME.partial.safetensors` has, for each tensor T of the global checkpoint, `value.T`: the average over the clients that
hold a coordinate (of running statistics the pooled ones, of batch counters the largest), in float64 for float tensors;
`weight.T`: the sum of their weights, and `count.T`: their number, both with length 1 along axes where all coordinates
have the same. Where no client holds a coordinate, `value` is the global checkpoint's. From these, `fill` and `covered`
at the root give what all clients at once would have given, up to the rounding of float64.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from cahfp_cli.checkpoint.digest import row_blocks
from cahfp_cli.checkpoint.dtypes import FLOATS, Array, largest, raw_bytes
from cahfp_cli.checkpoint.metadata import Digest, Provenance, Record, read_metadata
from cahfp_cli.checkpoint.safetensors_file import SafetensorsFile, TensorInfo, open_safetensors
from cahfp_cli.checkpoint.sharded import Tensors
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.errors import InputError
from cahfp_cli.formats.index_map import IndexMap, TensorMap, listed
from cahfp_cli.reconstruction.curvature import CAP
from cahfp_cli.reconstruction.gate import check_block, check_integers, check_statistics, header_bytes, mean_of
from cahfp_cli.reconstruction.rules import Floats

VALUE, WEIGHT, COUNT = "value", "weight", "count"
ELEMENT_BYTES = 8 + 8 + 4
"""Of a value, a weight and a count."""
MOST_CLIENTS = 100_000
"""The report counts, for each tensor, how many entries 0, 1, 2, ... clients hold."""
RECORD_BYTES = 1 << 25
"""What an aggregate may say of itself: it lists the files of all its clients."""
ROUNDING = 1e-9
"""What a sum of weights may be off, as a share."""


class PartialMetadata(Record):
    """clients: how many are aggregated; weight: the sum of their weights. keep_compensation: whether factors were left
    in. by_curvature: whether coordinates are weighed by curvature beside that."""

    format: Literal["cahfp.partial/1"] = "cahfp.partial/1"
    checkpoint: Digest
    clients: Annotated[int, Field(ge=1, le=MOST_CLIENTS)]
    weight: Annotated[float, Field(ge=1e-9, le=1e24, allow_inf_nan=False)]
    keep_compensation: bool = False
    by_curvature: bool = False
    provenance: Provenance


@dataclass(frozen=True)
class Partial:
    """A validated file, closed, read by the names of the global checkpoint's tensors."""

    file: SafetensorsFile
    index_map: IndexMap
    weight: float
    members: int
    keep_compensation: bool
    by_curvature: bool
    sha256: str

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.file.metadata

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """What it brings, by the global checkpoint's names."""
        return {name: self.file.tensors[f"{VALUE}.{name}"] for name in self.index_map.tensors}

    def read_rows(self, name: str, first: int, last: int) -> Array:
        return self.file.read_rows(f"{VALUE}.{name}", first, last)

    def weights(self, name: str, first: int, last: int) -> Floats:
        return self._rows(f"{WEIGHT}.{name}", first, last)

    def counts(self, name: str, first: int, last: int) -> Array:
        return self._rows(f"{COUNT}.{name}", first, last)

    def _rows(self, name: str, first: int, last: int) -> Array:
        one_for_all = self.file.tensors[name].rows == 1
        return self.file.read_rows(name, *((0, 1) if one_for_all else (first, last)))


def most_header(checkpoint: Tensors) -> int:
    """Bytes of the header of an aggregate at most."""
    return 3 * header_bytes(checkpoint) + RECORD_BYTES


def read_partial(checkpoint: Tensors, digest: str, path: Path) -> Partial:
    """Read and check a partial aggregate against the global checkpoint of content digest `digest`.

    Raises: InputError: it is not one, of another checkpoint, or its tensors do not fit together.
    """
    elements = sum(math.prod(info.shape) * ELEMENT_BYTES for info in checkpoint.tensors.values())
    room = most_header(checkpoint)
    with open_safetensors(path, elements + room, room) as file:
        metadata = read_metadata(file, PartialMetadata)
        if metadata.checkpoint != digest:
            raise InputError(
                f"{path}: it belongs to another checkpoint (digest {metadata.checkpoint[:12]}..., "
                f"not {digest[:12]}...)."
            )
        wanted = {f"{kind}.{name}" for kind in (VALUE, WEIGHT, COUNT) for name in checkpoint.tensors}
        if file.tensors.keys() != wanted:
            raise InputError(
                f"{path}: tensors are missing or too many: {listed(sorted(file.tensors.keys() ^ wanted))}."
            )
        for info in checkpoint.tensors.values():
            _check_shapes(file, info)
        hashed = hashlib.sha256(file.read_header())
        for info in sorted(file.tensors.values(), key=lambda info: info.start):
            _check_numbers(file, info, metadata, checkpoint, hashed)
        file.sha256 = hashed.hexdigest()
        for info in checkpoint.tensors.values():
            _check_held(file, info)
            mean = mean_of(info.name, checkpoint.tensors)
            if mean is not None:
                _check_pair(file, mean, info.name)
        whole = {
            info.name: TensorMap(info.shape, info.dtype, (None,) * len(info.shape))
            for info in checkpoint.tensors.values()
        }
        read = Partial(
            file,
            IndexMap(digest, whole),
            metadata.weight,
            metadata.clients,
            metadata.keep_compensation,
            metadata.by_curvature,
            file.sha256,
        )
        check_integers(read, read.index_map, checkpoint)
        check_statistics(read, read.index_map, checkpoint)
    return read


def _check_shapes(file: SafetensorsFile, info: TensorInfo) -> None:
    value, weight, count = (file.tensors[f"{kind}.{info.name}"] for kind in (VALUE, WEIGHT, COUNT))
    fits = value.shape == info.shape and value.dtype == ("F64" if info.dtype in FLOATS else info.dtype)
    for other, dtype in ((weight, "F64"), (count, "I32")):
        lengths = zip(other.shape, info.shape, strict=False)
        fits &= other.dtype == dtype and len(other.shape) == len(info.shape) and all(a in (1, b) for a, b in lengths)
    if not fits or weight.shape != count.shape:
        raise InputError(f"{file.path}: what it has of tensor {shown(info.name)} does not fit the global checkpoint's.")


def _check_numbers(
    file: SafetensorsFile,
    info: TensorInfo,
    metadata: PartialMetadata,
    checkpoint: Tensors,
    hashed: "hashlib._Hash",
) -> None:
    kind, _, name = info.name.partition(".")
    of_weight = metadata.weight * (1 + ROUNDING) * (CAP if metadata.by_curvature else 1)
    most = {WEIGHT: of_weight, COUNT: metadata.clients}.get(kind, np.inf)
    dtype = checkpoint.tensors[name].dtype
    for first, last in row_blocks(info):
        block = file.read_rows(info.name, first, last)
        hashed.update(raw_bytes(block))
        sent = partial(checkpoint.read_rows, name, first, last) if kind == VALUE else partial(np.zeros, ())
        check_block(file.path, info, block, sent)
        if kind != VALUE and ((block < 0).any() or (block > most).any()):
            raise InputError(f"{file.path}: {shown(info.name)} is negative or more than all of its clients have.")
        if kind == VALUE and dtype in FLOATS and (np.abs(block[np.isfinite(block)]) > largest(dtype)).any():
            raise InputError(f"{file.path}: {shown(info.name)} has numbers too large for {dtype}.")


def _check_pair(file: SafetensorsFile, mean: str, variance: str) -> None:
    """Mean and variance are pooled together, so the same clients must hold them."""
    for kind in (WEIGHT, COUNT):
        left, right = (file.tensors[f"{kind}.{name}"] for name in (mean, variance))
        if left.shape != right.shape or not np.array_equal(file.read(left.name), file.read(right.name)):
            raise InputError(f"{file.path}: it weighs {shown(mean)} and {shown(variance)} differently.")


def _check_held(file: SafetensorsFile, info: TensorInfo) -> None:
    weight, count = (file.tensors[f"{kind}.{info.name}"] for kind in (WEIGHT, COUNT))
    for first, last in row_blocks(weight):
        weighs = file.read_rows(weight.name, first, last) > 0
        if not np.array_equal(weighs, file.read_rows(count.name, first, last) > 0):
            raise InputError(f"{file.path}: {shown(info.name)} has a weight where it has no client, or the reverse.")
