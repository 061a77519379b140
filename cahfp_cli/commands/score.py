"""`cahfp score`: what each channel group is worth."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cahfp_cli.commands import options
from cahfp_cli.output import Console, table

if TYPE_CHECKING:
    from cahfp_cli.significance.scores import TrustRecord


def score(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="Trained network: a checkpoint of cahfp, or someone else's with --model."
        ),
    ],
    *,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            rich_help_panel=options.OUTPUT,
            help="Scores file to write (.safetensors).",
        ),
    ],
    data: options.Data = "digits@train",
    data_root: options.DataRoot = None,
    criterion: Annotated[
        str,
        typer.Option(
            "--criterion",
            metavar="CRITERION",
            autocompletion=options.offer(*options.CRITERIA),
            rich_help_panel=options.SCORING,
            help=f"How a channel group's worth is computed: {', '.join(options.CRITERIA)}.",
        ),
    ] = "gate-ggn",
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            metavar="N",
            min=1,
            max=options.MOST,
            rich_help_panel=options.CALIBRATION,
            help="Number of samples of --data to measure on, drawn at random.",
        ),
    ] = 256,
    held_out: Annotated[
        int,
        typer.Option(
            "--held-out",
            metavar="N",
            min=0,
            max=options.MOST,
            rich_help_panel=options.CALIBRATION,
            help="Number of further samples, to test on how far the scores can be trusted; 0 for no test.",
        ),
    ] = 256,
    top: Annotated[
        int | None,
        typer.Option(
            "--top",
            metavar="N",
            min=2,
            max=options.MOST,
            rich_help_panel=options.SCORING,
            help="Measure the curvature over the N likeliest classes of each sample. Without it, over all where there "
            "are at most 16, else over 3.",
        ),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            "--draws",
            metavar="N",
            min=1,
            max=options.MOST,
            rich_help_panel=options.SCORING,
            help="Estimate the curvature from N labels a sample, drawn from the network's own predictions, instead of "
            "class by class.",
        ),
    ] = None,
    shrink: Annotated[
        float,
        typer.Option(
            "--shrink",
            metavar="X",
            min=0,
            callback=options.finite,
            rich_help_panel=options.SCORING,
            help="For gate-loss: move each gradient towards zero by X of its standard errors, against noise; 0 leaves "
            "it as it is.",
        ),
    ] = 1.0,
    interactions: Annotated[
        bool,
        typer.Option(
            "--interactions/--no-interactions",
            rich_help_panel=options.OUTPUT,
            help="Also write how groups stand in for one another, which prune --selection quadratic needs.",
        ),
    ] = True,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    input_shape: options.InputShape = None,
    input_dtype: options.InputDtype = None,
    classes: options.Classes = None,
    key: options.Key = None,
    batch_size: options.BatchSize = 64,
    device: options.Device = "auto",
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Measure, by the curvature of the loss, what each channel group of a network is worth."""
    from cahfp_cli.checkpoint.atomic import check_file_target, check_no_input
    from cahfp_cli.commands.networks import check_global, open_network
    from cahfp_cli.errors import UsageError

    console = Console(json, quiet)
    # Slips in what was typed are answered here, before torch is imported.
    check_file_target(output, force)
    check_no_input(output, [checkpoint])
    check_global(checkpoint, "scores are measured on the global checkpoint")
    if top is not None and draws is not None:
        raise UsageError("--top and --draws exclude each other: either classes or drawn labels.")

    import numpy as np

    from cahfp_cli.data.spec import load_data
    from cahfp_cli.library.score import Scoring, save_scores
    from cahfp_cli.library.score import score as measure
    from cahfp_cli.running.device import use_threads
    from cahfp_cli.significance.measure import Measuring
    from cahfp_cli.significance.registry import SHRINK, find_criterion

    chosen = find_criterion(criterion)
    looks = {"--top": top is not None, "--draws": draws is not None}
    idle = [flag for flag, given_it in looks.items() if given_it and chosen.needs != "gates"]
    idle += ["--shrink"] if shrink != SHRINK and criterion != "gate-loss" else []
    if idle:
        console.warn(f"{' and '.join(idle)} without influence: {criterion} does not look at that")
    use_threads(threads)
    dataset = load_data(data, data_root=data_root) if chosen.needs != "weights" else None
    of_data = None if dataset is None else dataset.input_dtype
    network = open_network(
        checkpoint, model, model_arg, input_shape, input_dtype, classes, of_data, key, warn=console.warn
    )
    measuring = Measuring(batch_size, top, draws, interactions, seed, shrink)
    how = Scoring(criterion, samples, held_out, measuring, device)
    with console.progress("scoring") as progress:
        scores = measure(network, dataset, how, on_progress=progress, on_warning=console.warn)
    save_scores(scores, output, force=force)
    about, spread = scores.metadata, np.percentile(scores.significance, [0, 50, 100])
    console.result(
        f"{output}: {len(scores.significance)} channel groups in {len(about.families)} families, {criterion} "
        f"from {spread[0]:.3g} to {spread[2]:.3g} (median {spread[1]:.3g})"
        + (shown(about.trust) if about.trust else ""),
        {
            "output": str(output),
            "checkpoint": network.digest,
            "criterion": criterion,
            "groups": len(scores.significance),
            "families": len(about.families),
            "samples": about.samples,
            "loss": about.loss,
            "trust": about.trust.model_dump() if about.trust else None,
            "significance": {"min": spread[0], "median": spread[1], "max": spread[2]},
        },
    )


def shown(judged: "TrustRecord") -> str:
    """How far the scores can be trusted, for people."""
    head = f"\nreliability {judged.reliability:.3f}, {judged.effective_samples:.0f} effective samples"
    if judged.accuracy is not None and judged.chance is not None:
        head += f", accuracy {judged.accuracy:.1%} (always the same class: {judged.chance:.1%})"
    if not judged.sets:
        return f"{head}; not put to the test, which takes held-out samples and interactions"
    rows = [
        [f"{s.share:.0%} of each layer", str(s.groups), f"{s.predicted:.4f}", f"{s.measured:.4f}"] for s in judged.sets
    ]
    return f"{head}\n\n{table(['removed', 'groups', 'predicted, nats', 'measured, held out'], rows)}"
