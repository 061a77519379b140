"""What a reconstruction did, for people and for scripts."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cahfp_cli.reconstruction.clients import Refusal
from cahfp_cli.reconstruction.updates import Update


@dataclass(frozen=True)
class ClientReport:
    """path: of the submodel folder or partial aggregate. num_examples: the weight that it was given. members: clients
    in it. kept: the share of the global float entries that it holds. shrink: what clipping multiplied the updates of
    its weights and running statistics with.

    update, agreement: see updates.py; None where they were not asked for.
    """

    path: Path
    num_examples: float
    members: int
    kept: float
    shrink: tuple[float, float]
    update: Update | None
    agreement: float | None


@dataclass(frozen=True)
class TensorCoverage:
    """counts: how many entries of a float tensor 0, 1, 2, ... clients hold."""

    name: str
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Coverage:
    """Number of float entries of the global checkpoint that no client, some clients, all clients hold."""

    none: int
    some: int
    all: int


@dataclass(frozen=True)
class ReconstructionReport:
    """What was merged. `digest` is the content digest of the result, None if none was written."""

    output: Path
    rule: str
    keep_compensation: bool
    clients: tuple[ClientReport, ...]
    refused: tuple[Refusal, ...]
    members: int
    tensors: tuple[TensorCoverage, ...]
    digest: str | None
    written: bool
    warnings: tuple[str, ...]

    @property
    def coverage(self) -> Coverage:
        """Over all tensors."""
        total = sum(sum(tensor.counts) for tensor in self.tensors)
        none = sum(tensor.counts[0] for tensor in self.tensors)
        every = sum(sum(tensor.counts[self.members :]) for tensor in self.tensors)
        return Coverage(none, total - none - every, every)

    def as_json(self) -> dict[str, Any]:
        """Everything but the coverage of single tensors."""
        return {
            "output": str(self.output),
            "written": self.written,
            "rule": self.rule,
            "keep_compensation": self.keep_compensation,
            "digest": self.digest,
            "clients": [
                *({"folder": str(one.path), "accepted": True, "reason": None, **_client(one)} for one in self.clients),
                *({"folder": str(one.path), "accepted": False, "reason": one.reason} for one in self.refused),
            ],
            "coverage": asdict(self.coverage),
            "warnings": list(self.warnings),
        }

    def in_full(self) -> dict[str, Any]:
        """As `as_json`, with how many entries of each tensor 0, 1, 2, ... clients hold."""
        counts = {tensor.name: list(tensor.counts) for tensor in self.tensors}
        return {"format": "cahfp.reconstruction/1", **self.as_json(), "entries_by_holders": counts}


def _client(client: ClientReport) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "num_examples": client.num_examples,
        "clients": client.members,
        "kept": client.kept,
        "shrink": {"weights": client.shrink[0], "statistics": client.shrink[1]},
    }
    if client.update is not None:
        fields["update"] = {
            kind: {"norm": norms.moved, "norm_before": norms.before, "ratio": norms.ratio}
            for kind, norms in (("weights", client.update.weights), ("statistics", client.update.statistics))
        }
        fields["agreement"] = client.agreement
    return fields
