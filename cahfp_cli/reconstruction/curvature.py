"""What a client says about the curvature of its loss, weight by weight, for the rule that averages by it.

`curvature.safetensors` in a submodel folder has, for each weight of the submodel (not for running statistics), the
diagonal of the curvature on the client's own data, of the same name and shape, float32 and not negative. It is the
client's own claim, and clients that fit their data report almost none: so it only counts relative to the mean of its
own tensor, floored and capped, and never says how much a client weighs as a whole (after Fisher merging, Matena and
Raffel 2022).
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cahfp_cli.checkpoint.digest import row_blocks
from cahfp_cli.checkpoint.dtypes import DTYPES, Array, raw_bytes
from cahfp_cli.checkpoint.metadata import CurvatureMetadata, read_metadata
from cahfp_cli.checkpoint.safetensors_file import SafetensorsFile, open_safetensors
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.errors import InputError
from cahfp_cli.formats.factors import factor_product
from cahfp_cli.formats.files import CURVATURE
from cahfp_cli.formats.index_map import IndexMap, TensorMap, listed, weights_of
from cahfp_cli.reconstruction.rules import Floats

DTYPE = "F32"
FLOOR, CAP = 0.1, 10.0
"""Bounds of a weight's curvature over the mean of its tensor's."""


@dataclass(frozen=True)
class Curvature:
    """A validated file, closed, with the mean of each tensor. Where a submodel was compensated it describes the scaled
    weights; that of the weights without factors, which are merged, is factor^2 times as much."""

    file: SafetensorsFile
    index_map: IndexMap
    means: dict[str, float]
    sha256: str

    def weighs(self, name: str) -> bool:
        return name in self.means

    def relative(self, name: str, first: int, last: int) -> Floats:
        """Curvature of rows over the tensor's mean, within `FLOOR` and `CAP`; 1 where the whole tensor has none."""
        rows = _unscaled(self.file.read_rows(name, first, last), self.index_map.tensors[name], first, last)
        mean = self.means[name]
        return np.clip(rows / mean, FLOOR, CAP) if mean > 0 else np.ones_like(rows)


def read_curvature(folder: Path, submodel: SafetensorsFile, index_map: IndexMap, max_header: int) -> Curvature:
    """Read and check a client's curvature.

    Args: index_map: with the factors that are taken out of the submodel before it is merged. max_header: bytes that a
        sound header has at most.
    Raises: InputError: there is none, it is of another checkpoint, does not have the submodel's weights, or has numbers
        that are negative or not finite.
    """
    wanted = weights_of(index_map)
    path = folder / CURVATURE
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; `cahfp train --curvature` writes it, or choose another rule.")
    elements = sum(math.prod(submodel.tensors[name].shape) for name in wanted)
    with open_safetensors(path, DTYPES[DTYPE].itemsize * elements + max_header, max_header) as file:
        if read_metadata(file, CurvatureMetadata).checkpoint != index_map.checkpoint:
            raise InputError(f"{path}: it belongs to another checkpoint; measure it again.")
        if file.tensors.keys() != wanted:
            raise InputError(
                f"{path}: it must have the submodel's weights; at odds: {listed(sorted(file.tensors.keys() ^ wanted))}."
            )
        digest, means = hashlib.sha256(file.read_header()), {}
        for info in sorted(file.tensors.values(), key=lambda info: info.start):
            if info.dtype != DTYPE or info.shape != submodel.tensors[info.name].shape:
                raise InputError(
                    f"{path}: tensor {shown(info.name)} is {info.dtype} {list(info.shape)}, not {DTYPE} "
                    f"{list(submodel.tensors[info.name].shape)}."
                )
            sums: list[float] = []
            for first, last in row_blocks(info):
                block = file.read_rows(info.name, first, last)
                digest.update(raw_bytes(block))
                rows = _unscaled(block, index_map.tensors[info.name], first, last).reshape(max(1, last - first), -1)
                if not np.isfinite(rows).all() or (rows < 0).any():
                    raise InputError(
                        f"{path}: tensor {shown(info.name)} holds a curvature that is negative or not finite."
                    )
                sums += rows.sum(axis=1).tolist()
            means[info.name] = math.fsum(sums) / max(1, math.prod(info.shape))
        file.sha256 = digest.hexdigest()
    return Curvature(file, index_map, means, file.sha256)


def _unscaled(rows: Array, entry: TensorMap, first: int, last: int) -> Floats:
    factors = entry.factors
    if factors and factors[0] is not None:
        factors = (factors[0][first:last], *factors[1:])
    product = factor_product(factors)
    found = rows.astype(np.float64)
    return found if product is None else found * product**2
