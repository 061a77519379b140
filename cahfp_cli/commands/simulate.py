"""`cahfp simulate`: federated rounds of several methods on equal terms, on one machine."""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cahfp_cli.commands import options
from cahfp_cli.commands.live import watched
from cahfp_cli.commands.options import choice
from cahfp_cli.errors import UsageError
from cahfp_cli.output import Console, Json, table

if TYPE_CHECKING:
    from cahfp_cli.federation.experiment import Experiment
    from cahfp_cli.federation.simulation import Run
    from cahfp_cli.plots.html_report import Picture

BACKENDS = ("local", "flower")
ACCURACIES = {
    "global": "recalibrated",
    "as left": "plain",
    "deployed": "deployed",
    "own": "own",
    "tuned": "tuned",
}
"""Heads of columns, and names in the summary."""
COLUMNS = ("method", *(f"{head}, %" for head in ACCURACIES), "uploaded, MB", "client TFLOP", "seconds")
FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], float], bool]] = {
    "round": ("round", lambda row: row["round"], False),
    "uploaded": ("uploaded, MB", lambda row: row["uploaded_bytes"] / 1e6, True),
    "flops": ("client TFLOP", lambda row: row["client_flops"] / 1e12, True),
}
"""By file name: the label of x, x of a round's row, whether x is logarithmic."""


def simulate(
    experiment: Annotated[
        Path, typer.Argument(metavar="EXPERIMENT.toml", help="Experiment to run: methods, data, fleet, rounds.")
    ],
    *,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", rich_help_panel=options.OUTPUT, help="Folder to write."),
    ],
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", rich_help_panel=options.OUTPUT, help="Go on where a simulation into this folder was stopped."
        ),
    ] = False,
    backend: Annotated[
        str,
        choice(
            "--backend",
            BACKENDS,
            options.RUNTIME,
            "Run clients in this process (local) or as nodes of Flower's simulation (flower).",
        ),
    ] = "local",
    deadline: Annotated[
        float,
        typer.Option(
            "--deadline",
            metavar="SECONDS",
            min=1,
            callback=options.finite,
            rich_help_panel=options.RUNTIME,
            help="Seconds that a node of Flower has to answer.",
        ),
    ] = 600.0,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            metavar="N",
            min=1,
            max=options.MOST_THREADS,
            rich_help_panel=options.RUNTIME,
            help="Runs (method, partition, seed) at the same time, in processes of --threads threads each.",
        ),
    ] = 1,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Simulate federated rounds: every method on every partition with every seed, then figures and a report."""
    from cahfp_cli.commands.networks import check_there

    console = Console(json, quiet)
    check_there(experiment)
    if jobs > 1 and backend != "local":
        raise UsageError("--jobs belongs to --backend local.")
    if find_spec("matplotlib") is None:  # said before hours of rounds, not after them
        raise UsageError("figures need matplotlib: pip install 'cahfp[plots]'.")

    import torch

    from cahfp_cli.federation.experiment import read_experiment
    from cahfp_cli.federation.simulation import SUMMARY, check_merged, simulate_in_parallel, summary
    from cahfp_cli.federation.simulation import simulate as run
    from cahfp_cli.provenance import provenance
    from cahfp_cli.reconstruction.allocator import keep_freed_memory
    from cahfp_cli.running.device import use_threads

    asked = read_experiment(experiment)
    use_threads(threads)
    keep_freed_memory()

    source = provenance("simulate", {}, [experiment])
    with watched(console, asked.rounds) as committed:
        if backend == "flower":
            from cahfp_cli.federation.flower.engine import simulate_on_flower

            runs = simulate_on_flower(asked, output, source, deadline=deadline, resume=resume, on_round=committed)
        elif jobs > 1:
            runs = simulate_in_parallel(
                asked, output, source, jobs, torch.get_num_threads(), resume=resume, on_round=committed
            )
        else:
            runs = run(asked, output, source, resume=resume, on_round=committed)
    found = summary(asked, runs)
    write_figures(asked, runs, found, output)
    text = "\n\n".join(
        "\n".join([p, table(COLUMNS, rows_of(found, p)), *missing_of(found, p)]) for p in asked.partitions
    )
    console.result(f"{text}\n\nwrote {output}", {"output": str(output), "summary": str(output / SUMMARY), **found})
    check_merged(runs)


def rows_of(found: Json, partition: str) -> list[list[str]]:
    """The table of one partition."""

    def percent(entry: Json | None) -> str:
        return "-" if entry is None else f"{100 * entry['mean']:.1f} ± {100 * entry['sd']:.1f}"

    return [
        [
            entry["method"],
            *(percent(entry[name]) for name in ACCURACIES.values()),
            f"{entry['uploaded_bytes'] / 1e6:.1f}",
            f"{entry['client_flops'] / 1e12:.3f}",
            f"{entry['seconds']:.0f}",
        ]
        for entry in found["results"]
        if entry["partition"] == partition
    ]


def missing_of(found: Json, partition: str) -> list[str]:
    """A line for each figure in the table of a partition that is missing."""
    heads = {name: head for head, name in ACCURACIES.items()}
    return [
        f"{entry['method']}: {heads[name]} is missing: {why}"
        for entry in found["results"]
        if entry["partition"] == partition
        for name, why in entry["missing"].items()
    ]


def write_figures(asked: "Experiment", runs: "Sequence[Run]", found: Json, output: Path) -> None:
    """The figures, each as a PNG, and all of them with the tables in `report.html`."""
    from cahfp_cli.federation.simulation import folder_name, write_text
    from cahfp_cli.plots.curves import draw_curves
    from cahfp_cli.plots.figure_file import save_figure
    from cahfp_cli.plots.html_report import Listing, Picture, Table, html_report

    parts: list[Table | Picture | Listing] = []
    for partition in asked.partitions:
        parts.append(Table(partition, COLUMNS, rows_of(found, partition)))
        if missing := missing_of(found, partition):
            parts.append(Listing(f"{partition}: what is missing", "\n".join(missing)))
        devices = [
            [entry["method"], *("-" if share is None else f"{100 * share:.1f}" for share in entry["by_device"])]
            for entry in found["results"]
            if entry["partition"] == partition
        ]
        for accuracy in ("recalibrated", "deployed"):
            for name, (label, x_of, log) in FIGURES.items():
                curves = {
                    method: [
                        curve(one, x_of, accuracy) for one in runs if (one.partition, one.method) == (partition, method)
                    ]
                    for method in asked.methods
                }
                shown = "global accuracy, %" if accuracy == "recalibrated" else "deployed accuracy, %"
                figure = draw_curves(curves, partition, label, shown, log)
                save_figure(figure, output / f"{folder_name(partition)}-{accuracy}-by-{name}.png", force=True)
                parts.append(Picture(f"{partition}: {shown} by {label}", figure))
        parts += coverage_parts(asked, runs, partition, output)
        if asked.evaluation.bound_terms:
            parts.append(bound_part(asked, runs, partition, output))
        numbers = [str(client) for client in range(asked.clients)]
        parts.append(Table(f"{partition}: accuracy of each device's submodel as cut, %", ("method", *numbers), devices))
    parts.append(Listing("Experiment", asked.model_dump_json(indent=2)))
    introduction = (
        f"{len(asked.methods)} methods, {asked.clients} clients of which {asked.clients_per_round} a round, "
        f"{asked.rounds} rounds, {len(asked.seeds)} seeds: "
        "mean and standard deviation over seeds after the last round. "
        "global: the global network with renewed statistics of norms; as left: without. deployed: mean over devices of "
        "the submodels cut for them; own: the same with classes as the device's own data has them; tuned: that "
        "after one local epoch. uploaded and FLOP: of all clients in all rounds."
    )
    write_text(output / "report.html", html_report(f"cahfp simulate: {asked.name}", introduction, parts))


def rounds_of(asked: "Experiment", runs: "Sequence[Run]", partition: str, key: str) -> dict[str, list[list[Any]]]:
    """A figure of every round of every run on a partition, by method."""
    return {
        method: [[row[key] for row in one.rows] for one in runs if (one.partition, one.method) == (partition, method)]
        for method in asked.methods
    }


def coverage_parts(asked: "Experiment", runs: "Sequence[Run]", partition: str, output: Path) -> "list[Picture]":
    """Who trains what, by round and by layer."""
    from cahfp_cli.federation.simulation import folder_name
    from cahfp_cli.plots.figure_file import save_figure
    from cahfp_cli.plots.html_report import Picture
    from cahfp_cli.plots.training_coverage import by_layer, by_round, draw_by_layer, draw_by_round

    most, title = asked.clients_per_round, f"{partition}: clients of a round that train an entry"
    rows = rounds_of(asked, runs, partition, "coverage")
    figures = {
        "round": draw_by_round({method: by_round(own, most) for method, own in rows.items()}, title),
        "layer": draw_by_layer({method: by_layer(own, most) for method, own in rows.items()}, title),
    }
    for name, figure in figures.items():
        save_figure(figure, output / f"{folder_name(partition)}-coverage-by-{name}.png", force=True)
    return [Picture(f"{title}, by {name}", figure) for name, figure in figures.items()]


def bound_part(asked: "Experiment", runs: "Sequence[Run]", partition: str, output: Path) -> "Picture":
    """The terms of the convergence bound."""
    from cahfp_cli.federation.simulation import folder_name
    from cahfp_cli.plots.bound import draw_bound
    from cahfp_cli.plots.figure_file import save_figure
    from cahfp_cli.plots.html_report import Picture

    title = f"{partition}: terms of the convergence bound by round, without their constants"
    figure = draw_bound(rounds_of(asked, runs, partition, "bound"), title)
    save_figure(figure, output / f"{folder_name(partition)}-bound.png", force=True)
    return Picture(title, figure)


def curve(one: "Run", x_of: Callable[[dict[str, Any]], float], accuracy: str) -> tuple[list[float], list[float]]:
    """The rounds of a run that were evaluated; NaN for an accuracy that is missing."""
    rows = [row for row in one.rows if "accuracy" in row]
    found = [row["accuracy"][accuracy] for row in rows]
    return [float(x_of(row)) for row in rows], [math.nan if y is None else 100 * y for y in found]
