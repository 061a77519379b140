"""Measuring what channel groups are worth."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from pydantic import JsonValue

from cahfp_cli.checkpoint.atomic import atomic_file
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.library.data import Data, dataset_of
from cahfp_cli.library.network import Network, analysed, check_data, warn
from cahfp_cli.provenance import given, portable, provenance
from cahfp_cli.running.device import pick_device, repeatable
from cahfp_cli.significance.measure import Measuring, measure, split
from cahfp_cli.significance.registry import find_criterion
from cahfp_cli.significance.scores import Scores, ScoresMetadata, TrustRecord, write_scores
from cahfp_cli.significance.trust import Trust, trust

Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Scoring:
    """How to score.

    criterion: by name. samples: to measure on; held_out: others, on which the scores are tried. measuring: of the
    gates. device: `auto`, `cpu`, `cuda` or `mps`.
    """

    criterion: str = "gate-ggn"
    samples: int = 512
    held_out: int = 256
    measuring: Measuring = field(default_factory=Measuring)
    device: str = "auto"


def score(
    network: Network,
    data: Data | None = None,
    how: Scoring | None = None,
    *,
    on_progress: Progress = silent,
    on_warning: Callable[[str], None] = warn,
) -> Scores:
    """Measure what each channel group of a network is worth.

    Args:
        network: left as it was. data: needed by every criterion but those that look at weights alone.
    Raises:
        UsageError: there is no such criterion, or it needs data.
        InputError: data do not fit, nothing can be pruned, a sample gives NaN or Inf.
        VerificationError: see coupling/analysis.py.
    """
    how = how or Scoring()
    chosen = find_criterion(how.criterion)
    dataset = None
    if chosen.needs != "weights":
        if data is None:
            raise UsageError(f"{how.criterion} looks at data: give some, or choose a criterion of weights, such as l2.")
        dataset = dataset_of(data, network.classes)
    measuring = how.measuring
    calibration, others = None, None
    if dataset is not None:
        check_data(dataset, network)
        calibration, others = split(dataset, how.samples, how.held_out, measuring.seed)
        if len(calibration) < how.samples:
            on_warning(f"{dataset.name} has only {len(calibration)} samples, fewer than --samples {how.samples}")
    analysis = analysed(network, dataset, on_warning)
    if analysis.groups.count == 0:
        raise InputError(f"{named(network)}: no channel group of this network can be pruned.")
    where = pick_device(how.device)
    network.model.to(where)
    with repeatable(measuring.seed, where):
        found = measure(network.model, analysis.groups, chosen, calibration, measuring, on_progress)
        judged: Trust | None = None
        if found.gates is not None:
            x = others.x if others else None
            judged = trust(network.model, analysis, found.significance, found.gates, x, measuring.batch_size)
    network.model.to(torch.device("cpu"))
    for warning in judged.warnings() if judged else ():
        on_warning(warning)
    gates = found.gates
    metadata = ScoresMetadata(
        checkpoint=network.digest,
        input_dtype=network.input_dtype,
        criterion=how.criterion,
        samples=len(calibration) if calibration is not None else None,
        loss=gates.loss if gates else None,
        trust=TrustRecord.model_validate(asdict(judged)) if judged else None,
        families=analysis.groups.names,
        provenance=provenance("score", options_of(how, dataset, gates is not None), network.files),
    )
    return Scores(
        metadata,
        found.significance,
        analysis.groups.family,
        analysis.groups.sizes(name for name, _ in network.model.named_parameters()),
        gradient=gates.gradient if gates else None,
        gradient_error=gates.gradient_error if gates else None,
        curvature=gates.curvature if gates else None,
        interactions=gates.interactions if gates else None,
    )


def named(network: Network) -> str:
    """What a network goes by in messages."""
    return str(network.files[0]) if network.files else network.spec.spec.strip("<>")


def save_scores(scores: Scores, path: Path | str, *, force: bool = False) -> None:
    """Write scores as a file that `cahfp prune --scores` takes. Raises: InputError: it exists and not `force`."""
    with atomic_file(Path(path), force) as temporary:
        write_scores(temporary, scores)


def options_of(how: Scoring, dataset: Dataset | None, gates: bool) -> dict[str, JsonValue]:
    """What the scores depend on and their inputs do not say, for the record."""
    measuring = how.measuring
    options: dict[str, JsonValue] = {"criterion": how.criterion, "seed": measuring.seed}
    if dataset is not None:
        options |= {"data": portable(dataset.name), "samples": how.samples, "batch_size": measuring.batch_size}
    if gates:
        options |= given({"held_out": how.held_out, "top": measuring.top, "draws": measuring.draws})
        options |= {"shrink": measuring.shrink} if how.criterion == "gate-loss" else {}
    return options
