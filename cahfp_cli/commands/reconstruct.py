"""`cahfp reconstruct`: merge what the devices trained back into the global checkpoint."""

import json as json_text
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cahfp_cli.commands.options import (
    CHECKS,
    MERGING,
    MOST,
    MOST_THREADS,
    OUTPUT,
    RULES,
    RUNTIME,
    DryRun,
    Force,
    Json,
    Key,
    Quiet,
    number_or_percentage,
    offer,
)
from cahfp_cli.errors import UsageError
from cahfp_cli.output import Console, table

if TYPE_CHECKING:
    from cahfp_cli.checkpoint.sharded import Tensors
    from cahfp_cli.reconstruction.report import ReconstructionReport


def reconstruct(
    global_checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="GLOBAL", help="Checkpoint that was pruned: a file, also one of torch.save, or a folder of shards."
        ),
    ],
    submodels: Annotated[
        list[Path], typer.Argument(metavar="SUBMODEL_DIR...", help="One folder for each client, or partial aggregates.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", rich_help_panel=OUTPUT, help="Checkpoint to write (.safetensors)."
        ),
    ],
    rule: Annotated[
        str,
        typer.Option(
            "--rule",
            metavar="RULE",
            autocompletion=offer(*RULES),
            rich_help_panel=MERGING,
            help="How clients are averaged. fill: a client counts with GLOBAL's value where it has none. "
            "covered: over those that hold an entry. curvature: as covered, weighed by the curvature that "
            "train --curvature measured. trimmed-mean, median: robust, over those that hold an entry, all with the "
            "same weight.",
        ),
    ] = "fill",
    trim: Annotated[
        float | None,
        typer.Option(
            "--trim",
            metavar="SHARE",
            parser=number_or_percentage,
            rich_help_panel=MERGING,
            help="Share of the clients that trimmed-mean leaves out at each end (0.2 or 20%); 0.2 unless given.",
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            metavar="DIR=N",
            rich_help_panel=MERGING,
            help="Weight of a client, in place of the number of examples that it trained on.",
        ),
    ] = None,
    keep_compensation: Annotated[
        bool,
        typer.Option(
            "--keep-compensation",
            rich_help_panel=MERGING,
            help="Merge the weights as `prune` scaled them to make up for removed channels. Without it the scaling is "
            "taken out first.",
        ),
    ] = False,
    maps: Annotated[
        Path | None,
        typer.Option(
            "--maps",
            metavar="FOLDER",
            rich_help_panel=CHECKS,
            help="Folder of the server's own index maps; the clients' copies are not read.",
        ),
    ] = None,
    skip_invalid: Annotated[
        bool,
        typer.Option(
            "--skip-invalid",
            rich_help_panel=CHECKS,
            help="Leave out clients that do not pass the checks, and report them, instead of stopping.",
        ),
    ] = False,
    min_clients: Annotated[
        int,
        typer.Option(
            "--min-clients",
            metavar="N",
            min=1,
            max=MOST,
            rich_help_panel=CHECKS,
            help="Fewest clients that must pass.",
        ),
    ] = 1,
    max_examples: Annotated[
        float | None,
        typer.Option(
            "--max-examples",
            metavar="N",
            rich_help_panel=CHECKS,
            help="Refuse a client that claims to have trained on more examples.",
        ),
    ] = None,
    max_update: Annotated[
        float | None,
        typer.Option(
            "--max-update",
            metavar="X",
            rich_help_panel=CHECKS,
            help="Refuse a client whose weights changed by more than X times their norm.",
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            "--clip",
            metavar="X|median",
            autocompletion=offer("median"),
            rich_help_panel=MERGING,
            help="Shrink larger updates to X times the norm of the weights before, or to the median of the clients.",
        ),
    ] = None,
    server_lr: Annotated[
        float,
        typer.Option(
            "--server-lr",
            metavar="X",
            rich_help_panel=MERGING,
            help="Server learning rate: how far to go from GLOBAL (0) to what was merged (1).",
        ),
    ] = 1.0,
    server_momentum: Annotated[
        float,
        typer.Option(
            "--server-momentum",
            metavar="SHARE",
            parser=number_or_percentage,
            rich_help_panel=MERGING,
            help="Share of the last round's step to add (0.9 or 90%); needs --before.",
        ),
    ] = 0.0,
    before: Annotated[
        Path | None,
        typer.Option(
            "--before",
            metavar="FILE",
            rich_help_panel=MERGING,
            help="Global checkpoint of the round before, for --server-momentum.",
        ),
    ] = None,
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            rich_help_panel=OUTPUT,
            help="Write a partial aggregate (.partial.safetensors), which a further `reconstruct` takes like a client.",
        ),
    ] = False,
    report_file: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE",
            rich_help_panel=OUTPUT,
            help="JSON report to write: clients, sizes of updates, how many clients hold each tensor.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", rich_help_panel=OUTPUT, help="The same as a page to look at."),
    ] = None,
    key: Key = None,
    threads: Annotated[
        int,
        typer.Option(
            "--threads", metavar="N", min=1, max=MOST_THREADS, rich_help_panel=RUNTIME, help="CPU threads to use."
        ),
    ] = 1,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Merge client submodels back into one global checkpoint."""
    from cahfp_cli.checkpoint.atomic import check_file_target, check_no_input
    from cahfp_cli.formats.files import FILES
    from cahfp_cli.provenance import provenance
    from cahfp_cli.reconstruction import merge
    from cahfp_cli.reconstruction.allocator import keep_freed_memory
    from cahfp_cli.reconstruction.round import Step
    from cahfp_cli.reconstruction.rules import rule_named

    console = Console(json=json, quiet=quiet)
    rule_named(rule, trim)
    step = Step(server_lr, server_momentum, before)
    reports = [path for path in (report_file, html) if path is not None]
    for path in reports:
        check_file_target(path, force)
    if reports and dry_run:
        raise UsageError("--report and --html tell of what was merged, and --dry-run merges nothing.")
    read = [path / name for path in submodels for name in FILES] + submodels
    check_no_input(output, read)
    for path in reports:
        check_no_input(path, [global_checkpoint, *read])
    targets = [path.resolve() for path in (output, *reports)]
    if len(set(targets)) < len(targets):
        raise UsageError("--output, --report and --html: two of them are the same file.")
    keep_freed_memory()

    def open_global(path: Path) -> "AbstractContextManager[Tensors]":
        return opened(path, key if path == global_checkpoint else None, console.warn)

    with console.progress("merging", of_bytes=True) as progress:
        report = merge.reconstruct(
            global_checkpoint,
            submodels,
            output,
            rule=rule,
            trim=trim,
            weights=_weights(weight or []),
            keep_compensation=keep_compensation,
            skip_invalid=skip_invalid,
            min_clients=min_clients,
            maps=maps,
            max_examples=max_examples,
            max_update=max_update,
            clip=_clip(clip),
            step=step,
            partial=partial,
            audit=report_file is not None or html is not None,
            threads=threads,
            force=force,
            provenance=provenance("reconstruct", _options(rule, trim, keep_compensation, clip, step, partial, key), []),
            on_progress=progress,
            dry_run=dry_run,
            open_global=open_global,
        )
    for warning in report.warnings:
        console.warn(warning)
    for client in report.refused:
        console.warn(f"left out: {client.reason}")
    if not dry_run:
        _write_reports(report, report_file, html, force)
    console.result(_human(report), report.as_json())


def _options(
    rule: str, trim: float | None, keep_compensation: bool, clip: str | None, step: Any, partial: bool, key: str | None
) -> dict[str, Any]:
    """What is recorded: everything that the result depends on and that its inputs do not say, unless it is default."""
    options: dict[str, Any] = {"rule": rule}
    given = {
        "trim": trim,
        "keep_compensation": keep_compensation or None,
        "clip": clip,
        "server_lr": step.rate if step.rate != 1 else None,
        "server_momentum": step.momentum or None,
        "before": None if step.before is None else _digest(step.before),
        "partial": partial or None,
        "key": key,
    }
    return options | {name: value for name, value in given.items() if value is not None}


@contextmanager
def opened(path: Path, key: str | None, warn: Callable[[str], None]) -> "Iterator[Tensors]":
    """A checkpoint, as `prune` reads it; torch is only imported for files that it wrote, which are held in memory."""
    from cahfp_cli.checkpoint.safetensors_file import is_pytorch
    from cahfp_cli.checkpoint.sharded import open_checkpoint

    if key is None and not is_pytorch(path):
        with open_checkpoint(path) as file:
            yield file
        return

    from cahfp_cli.models.checkpoint_io import open_weights

    with open_weights(path, key) as weights:
        for remark in weights.remarks:
            warn(remark)
        yield weights.file


def _digest(path: Path) -> str:
    from cahfp_cli.checkpoint.digest import content_digest

    with opened(path, None, lambda remark: None) as file:
        return content_digest(file)


def _clip(text: str | None) -> float | Literal["median"] | None:
    if text is None:
        return None
    if text == "median":
        return "median"
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--clip {text}: give a number above 0, or median.") from None


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


def _write_reports(report: "ReconstructionReport", file: Path | None, html: Path | None, force: bool) -> None:
    from cahfp_cli.checkpoint.atomic import atomic_file

    if file is not None:
        with atomic_file(file, force) as temporary:
            temporary.write_text(json_text.dumps(report.in_full(), indent=2, sort_keys=True, allow_nan=False) + "\n")
    if html is not None:
        from cahfp_cli.plots.coverage import coverage_page

        with atomic_file(html, force) as temporary:
            temporary.write_text(coverage_page(report))


def _human(report: "ReconstructionReport") -> str:
    rows = [[str(client.path), f"{client.num_examples:g}", f"{client.kept:.1%}"] for client in report.clients]
    entries = report.coverage
    total = max(1, entries.none + entries.some + entries.all)
    shares = ", ".join(
        f"{count / total:.1%} by {who}"
        for count, who in ((entries.all, "all clients"), (entries.some, "some"), (entries.none, "none"))
    )
    outcome = f"wrote {report.output}" if report.written else f"all fits; not written (--dry-run): {report.output}"
    rule = f"rule: {report.rule}" + (", compensation kept" if report.keep_compensation else "")
    return "\n".join([table(["client", "examples", "kept"], rows), "", f"entries held: {shares}", rule, outcome])
