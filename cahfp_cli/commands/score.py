"""`cahfp score`: what each channel group is worth."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cahfp_cli.commands import options
from cahfp_cli.output import Console, Json, table

if TYPE_CHECKING:
    from cahfp_cli.significance.trust import Trust


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
    from cahfp_cli.checkpoint.atomic import atomic_file, check_file_target, check_no_input
    from cahfp_cli.commands.networks import analysed, check_data, check_global, given, open_network
    from cahfp_cli.errors import InputError, UsageError

    console = Console(json, quiet)
    # Slips in what was typed are answered here, before torch is imported.
    check_file_target(output, force)
    check_no_input(output, [checkpoint])
    check_global(checkpoint, "scores are measured on the global checkpoint")
    if top is not None and draws is not None:
        raise UsageError("--top and --draws exclude each other: either classes or drawn labels.")

    from dataclasses import asdict

    import numpy as np

    from cahfp_cli.data.spec import load_data
    from cahfp_cli.provenance import portable, provenance
    from cahfp_cli.running.device import pick_device, repeatable, use_threads
    from cahfp_cli.significance.measure import Measuring, measure, split
    from cahfp_cli.significance.registry import SHRINK, find_criterion
    from cahfp_cli.significance.scores import Scores, ScoresMetadata, TrustRecord, write_scores
    from cahfp_cli.significance.trust import trust

    chosen = find_criterion(criterion)
    looks = {"--top": top is not None, "--draws": draws is not None}
    idle = [flag for flag, given_it in looks.items() if given_it and chosen.needs != "gates"]
    idle += ["--shrink"] if shrink != SHRINK and criterion != "gate-loss" else []
    if idle:
        console.warn(f"{' and '.join(idle)} without influence: {criterion} does not look at that")
    use_threads(threads)
    where = pick_device(device)
    dataset = load_data(data, data_root=data_root) if chosen.needs != "weights" else None
    of_data = None if dataset is None else dataset.input_dtype
    network = open_network(
        checkpoint, model, model_arg, input_shape, input_dtype, classes, of_data, key, warn=console.warn
    )
    calibration, others = None, None
    if dataset is not None:
        check_data(dataset, network)
        calibration, others = split(dataset, samples, held_out, seed)
        if len(calibration) < samples:
            console.warn(f"{data} has only {len(calibration)} samples, fewer than --samples {samples}")
    analysis = analysed(network, console, dataset)
    if analysis.groups.count == 0:
        raise InputError(f"{checkpoint}: no channel group of this network can be pruned.")
    network.model.to(where)
    with repeatable(seed, where), console.progress("scoring") as progress:
        how = Measuring(batch_size, top, draws, interactions, seed, shrink)
        found = measure(network.model, analysis.groups, chosen, calibration, how, progress)
        judged = None
        if found.gates is not None:
            judged = trust(
                network.model, analysis, found.significance, found.gates, others.x if others else None, batch_size
            )
    for warning in judged.warnings() if judged else ():
        console.warn(warning)
    recorded: Json = {"criterion": criterion, "seed": seed}
    if calibration is not None:
        recorded |= given({"data": portable(data), "samples": samples, "batch_size": batch_size})
    if found.gates is not None:
        recorded |= given({"held_out": held_out, "top": top, "draws": draws})
        recorded |= {"shrink": shrink} if criterion == "gate-loss" else {}
    metadata = ScoresMetadata(
        checkpoint=network.digest,
        input_dtype=network.input_dtype,
        criterion=criterion,
        samples=len(calibration) if calibration is not None else None,
        loss=found.gates.loss if found.gates else None,
        trust=TrustRecord.model_validate(asdict(judged)) if judged else None,
        families=analysis.groups.names,
        provenance=provenance("score", recorded, network.files),
    )
    scores = Scores(
        metadata,
        found.significance,
        analysis.groups.family,
        analysis.groups.sizes(name for name, _ in network.model.named_parameters()),
        gradient=found.gates.gradient if found.gates else None,
        gradient_error=found.gates.gradient_error if found.gates else None,
        curvature=found.gates.curvature if found.gates else None,
        interactions=found.gates.interactions if found.gates else None,
    )
    with atomic_file(output, force) as temporary:
        write_scores(temporary, scores)
    spread = np.percentile(found.significance, [0, 50, 100])
    families = len(analysis.groups.names)
    console.result(
        f"{output}: {analysis.groups.count} channel groups in {families} families, {criterion} "
        f"from {spread[0]:.3g} to {spread[2]:.3g} (median {spread[1]:.3g})" + (shown(judged) if judged else ""),
        {
            "output": str(output),
            "checkpoint": network.digest,
            "criterion": criterion,
            "groups": analysis.groups.count,
            "families": families,
            "samples": metadata.samples,
            "loss": metadata.loss,
            "trust": asdict(judged) if judged else None,
            "significance": {"min": spread[0], "median": spread[1], "max": spread[2]},
        },
    )


def shown(judged: "Trust") -> str:
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
