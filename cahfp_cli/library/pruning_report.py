"""What a report says of a submodel: costs, widths, what it was chosen by, accuracy."""

from dataclasses import asdict, fields
from typing import Any

from pydantic import JsonValue

from cahfp_cli.device.cost import Cost
from cahfp_cli.device.quantities import Count, Share
from cahfp_cli.library.pruning_job import Demand, Job
from cahfp_cli.provenance import portable
from cahfp_cli.pruning.budget import Budget
from cahfp_cli.pruning.selection import Selection
from cahfp_cli.running.evaluation import Metrics


def limits_asked(budget: Budget) -> dict[str, JsonValue]:
    """A budget for the record."""
    values = {field.name: getattr(budget, field.name) for field in fields(budget)}
    return {n: v.value if isinstance(v, Share | Count) else v for n, v in values.items() if v is not None}


def describe(
    job: Job, demand: Demand, selection: Selection, full: Metrics | None, compact: Metrics | None
) -> dict[str, Any]:
    """The report of one submodel."""
    groups = job.analysis.groups
    widths = groups.widths(selection.kept).tolist()
    whole_widths = groups.widths(selection.kept | True).tolist()
    report: dict[str, Any] = {
        "profile": demand.name,
        "budget": {"met": True, "limits": selection.limits.by_name, "keep": demand.budget.keep},
        "binding": selection.binding,
        "groups": {"kept": int(selection.kept.sum()), "of": groups.count},
        "kept_groups": selection.kept.nonzero()[0].tolist(),
        "selection": job.settings,
        "widths": [
            {"family": name, "kept": kept, "of": whole}
            for name, kept, whole in zip(groups.names, widths, whole_widths, strict=True)
        ],
        "predicted": costs(selection.cost),
        "full": costs(selection.full),
        "not_modelled": list(job.unmodelled),
    }
    if job.scores is not None:
        report["significance_removed"] = float(job.scores.significance[~selection.kept].sum())
    if selection.prediction is not None:
        report["divergence"] = asdict(selection.prediction)
    if selection.gates is not None:
        moved = selection.gates[selection.kept]
        report["compensation"] = {"gates_moved": int((moved != 1).sum()), "least": moved.min(), "greatest": moved.max()}
    if job.evaluated is not None and full is not None and compact is not None:
        report["evaluation"] = {
            "data": portable(job.evaluated.name),
            "samples": full.samples,
            "before": figures(full),
            "after": figures(compact),
        }
    return report


def costs(cost: Cost) -> dict[str, Any]:
    """Costs as numbers: seconds, bytes, counts."""
    return {
        "latency_seconds": None if cost.latency_seconds is None else float(cost.latency_seconds),
        "memory_bytes": int(cost.memory_bytes),
        "storage_bytes": int(cost.storage_bytes),
        "macs": int(cost.macs),
        "params": int(cost.params),
    }


def figures(metrics: Metrics) -> dict[str, float]:
    return {"accuracy": metrics.accuracy, "loss": metrics.loss}
