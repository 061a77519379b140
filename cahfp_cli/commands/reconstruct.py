"""`cahfp reconstruct`: merge what the devices trained back into the global checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cahfp_cli.commands.options import DryRun, Force, Json, Quiet
from cahfp_cli.errors import UsageError
from cahfp_cli.output import Console, table

if TYPE_CHECKING:
    from cahfp_cli.reconstruction.merge import ReconstructionReport


def reconstruct(
    global_checkpoint: Annotated[Path, typer.Argument(metavar="GLOBAL", help="Checkpoint that was pruned.")],
    submodels: Annotated[list[Path], typer.Argument(metavar="SUBMODEL_DIR...", help="One folder for each client.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Checkpoint to write, OUT.safetensors.")],
    rule: Annotated[
        str,
        typer.Option(
            "--rule",
            help="fill: complete each client with GLOBAL, then average. "
            "covered: average each coordinate over the clients that hold it.",
        ),
    ] = "fill",
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            metavar="DIR=N",
            help="Weight of a client instead of its recorded number of examples; may be repeated.",
        ),
    ] = None,
    keep_compensation: Annotated[
        bool,
        typer.Option(
            "--keep-compensation",
            help="Merge the compensated weights as they are, instead of taking out what made up for removed groups.",
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Merge client submodels back into one global checkpoint."""
    from cahfp_cli.provenance import provenance
    from cahfp_cli.reconstruction import merge
    from cahfp_cli.reconstruction.rules import rule_named

    console = Console(json=json, quiet=quiet)
    rule_named(rule)
    weights = _weights(weight or [])
    options: dict[str, Any] = {"rule": rule}
    if weights:
        options["weights"] = sorted([folder.resolve().name, number] for folder, number in weights.items())
    if keep_compensation:
        options["keep_compensation"] = True
    with console.progress("merging") as progress:
        report = merge.reconstruct(
            global_checkpoint,
            submodels,
            output,
            rule=rule,
            weights=weights,
            keep_compensation=keep_compensation,
            force=force,
            provenance=provenance("reconstruct", options, [global_checkpoint, *submodels]),
            on_progress=progress,
            dry_run=dry_run,
        )
    for warning in report.warnings:
        console.warn(warning)
    console.result(_human(report), _machine(report))


def _weights(given: Sequence[str]) -> dict[Path, float]:
    weights: dict[Path, float] = {}
    for text in given:
        folder, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            equals = ""
        if not equals or not folder:
            raise UsageError(f"--weight {text}: give it as DIR=N, for example --weight clients/jetson=1200.")
        if Path(folder) in weights:
            raise UsageError(f"--weight {text}: this folder already has a weight.")
        weights[Path(folder)] = value
    return weights


def _human(report: "ReconstructionReport") -> str:
    rows = [[str(client.folder), f"{client.num_examples:g}", f"{client.kept:.1%}"] for client in report.clients]
    entries = report.coverage
    total = max(1, entries.none + entries.some + entries.all)
    shares = ", ".join(
        f"{count / total:.1%} by {who}"
        for count, who in ((entries.all, "all clients"), (entries.some, "some"), (entries.none, "none"))
    )
    outcome = f"wrote {report.output}" if report.digest else f"all fits; not written (--dry-run): {report.output}"
    rule = f"rule: {report.rule}" + (", compensation kept" if report.keep_compensation else "")
    return "\n".join([table(["client", "examples", "kept"], rows), "", f"entries held: {shares}", rule, outcome])


def _machine(report: "ReconstructionReport") -> dict[str, Any]:
    return {
        "output": str(report.output),
        "written": report.digest is not None,
        "rule": report.rule,
        "keep_compensation": report.keep_compensation,
        "digest": report.digest,
        "clients": [
            {"folder": str(client.folder), "num_examples": client.num_examples, "kept": client.kept}
            for client in report.clients
        ],
        "coverage": {"none": report.coverage.none, "some": report.coverage.some, "all": report.coverage.all},
        "warnings": list(report.warnings),
    }
