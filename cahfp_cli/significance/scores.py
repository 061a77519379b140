"""The scores file: per channel group what was measured and what it is worth. Reads and writes without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cahfp_cli.checkpoint.metadata import Digest, InputDtype, Provenance, Record, dump_metadata, read_metadata
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError

Finite = Annotated[float, Field(allow_inf_nan=False)]


class RemovedSetRecord(Record):
    """See `significance.trust.RemovedSet`."""

    share: Annotated[float, Field(gt=0, lt=1)]
    groups: Annotated[int, Field(ge=1)]
    predicted: Finite
    measured: Finite


class TrustRecord(Record):
    """See `significance.trust.Trust`."""

    reliability: Finite
    effective_samples: Finite
    sets: tuple[RemovedSetRecord, ...] = ()
    samples: Annotated[int, Field(ge=0)] = 0
    accuracy: Finite | None = None
    chance: Finite | None = None
    certainty: Finite | None = None


OPTIONAL, INTERACTIONS = ("gradient", "gradient_error", "curvature"), "interactions"


class ScoresMetadata(Record):
    """Metadata of `scores.safetensors`. samples is None for a criterion that looks at no data, loss and trust for one
    that measures no gates. input_dtype: of the samples that the network was traced with."""

    format: Literal["cahfp.scores/1"] = "cahfp.scores/1"
    checkpoint: Digest
    input_dtype: InputDtype = "float32"
    criterion: str
    samples: Annotated[int, Field(ge=1)] | None = None
    loss: float | None = None
    trust: TrustRecord | None = None
    families: tuple[str, ...]
    provenance: Provenance


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of all channel groups of one checkpoint.

    significance: float64 (groups,), larger is worth more.
    family: int64 (groups,), indices into `metadata.families`.
    sizes: int64 (groups,), elements of parameters that belong to the group, tied ones once.
    gradient, gradient_error, curvature: float64 (groups,), of the loss in the gates, the second the standard error of
        the first; None for a criterion that measures no gates.
    interactions: float32 (rows, groups), whose products of columns are the Gauss-Newton matrix of the gates; None
        where it was not kept.
    """

    metadata: ScoresMetadata
    significance: NDArray[np.float64]
    family: NDArray[np.int64]
    sizes: NDArray[np.int64]
    gradient: NDArray[np.float64] | None = None
    gradient_error: NDArray[np.float64] | None = None
    curvature: NDArray[np.float64] | None = None
    interactions: NDArray[np.float32] | None = None


def write_scores(path: Path, scores: Scores) -> None:
    """Write exactly `path` (see checkpoint/atomic.py for safety); equal scores give equal bytes."""
    arrays = {
        "significance": scores.significance,
        "family": scores.family,
        "sizes": scores.sizes,
        **{name: getattr(scores, name) for name in (*OPTIONAL, INTERACTIONS)},
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
        optional = {**dict.fromkeys(OPTIONAL, "F64"), INTERACTIONS: "F32"}
        if not set(dtypes) <= set(file.tensors) <= set(dtypes) | set(optional):
            raise InputError(f"{path}: its tensors are not those of a scores file. Run `cahfp score` again.")
        groups = file.tensors["significance"].shape
        for name, info in file.tensors.items():
            shape = info.shape[1:] if name == INTERACTIONS else info.shape
            if shape != groups or len(groups) != 1 or info.dtype != {**dtypes, **optional}[name]:
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
        **{name: arrays.get(name) for name in (*OPTIONAL, INTERACTIONS)},
    )
