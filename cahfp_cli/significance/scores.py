"""The scores file: per channel group what was measured and what it is worth. Reads and writes without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cahfp_cli.checkpoint.metadata import Digest, Provenance, Record, dump_metadata, read_metadata
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError


class ScoresMetadata(Record):
    """Metadata of `scores.safetensors`. samples and loss are None for a criterion that looks at no data."""

    format: Literal["cahfp.scores/1"] = "cahfp.scores/1"
    checkpoint: Digest
    criterion: str
    samples: Annotated[int, Field(ge=1)] | None = None
    loss: float | None = None
    families: tuple[str, ...]
    provenance: Provenance


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of all channel groups of one checkpoint.

    significance: float64 (groups,), larger is worth more.
    family: int64 (groups,), indices into `metadata.families`.
    sizes: int64 (groups,), elements of the checkpoint that belong to the group.
    gradient, curvature: float64 (groups,), of the loss in the gates; None for a criterion that looks at no data.
    """

    metadata: ScoresMetadata
    significance: NDArray[np.float64]
    family: NDArray[np.int64]
    sizes: NDArray[np.int64]
    gradient: NDArray[np.float64] | None = None
    curvature: NDArray[np.float64] | None = None


def write_scores(path: Path, scores: Scores) -> None:
    """Write exactly `path` (see checkpoint/atomic.py for safety); equal scores give equal bytes."""
    arrays = {
        "significance": scores.significance,
        "family": scores.family,
        "sizes": scores.sizes,
        "gradient": scores.gradient,
        "curvature": scores.curvature,
    }
    present = {name: array for name, array in arrays.items() if array is not None}
    save_arrays(path, present, dump_metadata(scores.metadata))


def read_scores(path: Path) -> Scores:
    """Read and check a scores file.

    Raises: InputError: damaged, not a scores file, of uneven lengths, non-finite, or families out of range.
    """
    with open_safetensors(path) as file:
        metadata = read_metadata(file, ScoresMetadata)
        dtypes = {"significance": "F64", "family": "I64", "sizes": "I64"}
        optional = {"gradient": "F64", "curvature": "F64"}
        if not set(dtypes) <= set(file.tensors) <= set(dtypes) | set(optional):
            raise InputError(f"{path}: its tensors are not those of a scores file. Run `cahfp score` again.")
        groups = file.tensors["significance"].shape
        for name, info in file.tensors.items():
            if info.shape != groups or len(groups) != 1 or info.dtype != {**dtypes, **optional}[name]:
                raise InputError(f"{path}: tensor {name!r} has the wrong shape or type. Run `cahfp score` again.")
        arrays = {name: file.read(name) for name in file.tensors}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {name} holds NaN or Inf. Run `cahfp score` again.")
    family, families = arrays["family"], len(metadata.families)
    if ((family < 0) | (family >= families)).any():
        raise InputError(f"{path}: a group belongs to none of the {families} families. Run `cahfp score` again.")
    return Scores(
        metadata,
        arrays["significance"],
        family,
        arrays["sizes"],
        arrays.get("gradient"),
        arrays.get("curvature"),
    )
