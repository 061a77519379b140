"""Merging what devices trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cahfp_cli.provenance import provenance
from cahfp_cli.reconstruction import merge
from cahfp_cli.reconstruction.report import ReconstructionReport


@dataclass(frozen=True)
class Merging:
    """How to merge: see `reconstruction.merge.reconstruct`."""

    rule: str = "fill"
    trim: float | None = None
    keep_compensation: bool = False
    skip_invalid: bool = False
    min_clients: int = 1
    max_update: float | None = None
    clip: float | Literal["median"] | None = None
    threads: int = 1


def reconstruct(
    global_checkpoint: Path | str,
    submodels: Sequence[Path | str],
    output: Path | str,
    how: Merging | None = None,
    *,
    weights: Mapping[Path, float] | None = None,
    force: bool = False,
) -> ReconstructionReport:
    """Merge the folders of trained submodels into a copy of the global checkpoint that they were cut from.

    Args: weights: of folders, instead of the numbers of samples that they record.
    Raises: UsageError, InputError: see `reconstruction.merge.reconstruct`; nothing is written then.
    """
    how = how or Merging()
    options = {"rule": how.rule, "trim": how.trim, "clip": how.clip, "keep_compensation": how.keep_compensation or None}
    return merge.reconstruct(
        Path(global_checkpoint),
        [Path(folder) for folder in submodels],
        Path(output),
        rule=how.rule,
        trim=how.trim,
        weights=weights,
        keep_compensation=how.keep_compensation,
        skip_invalid=how.skip_invalid,
        min_clients=how.min_clients,
        max_update=how.max_update,
        clip=how.clip,
        threads=how.threads,
        force=force,
        provenance=provenance("reconstruct", {n: v for n, v in options.items() if v is not None}, []),
    )
