"""`cahfp score`: what each channel group is worth."""

from pathlib import Path
from typing import Annotated

import typer

from cahfp_cli.commands import options
from cahfp_cli.output import Console, Json


def score(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Our checkpoint, or someone else's.")],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="The scores file to write (.safetensors).")],
    data: options.Data = "digits@train",
    data_root: options.DataRoot = None,
    criterion: Annotated[
        str, typer.Option(help="gate-ggn | gate-fisher | gate-taylor | l1 | l2 | random")
    ] = "gate-ggn",
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples, drawn from --data.")] = 256,
    draws: Annotated[
        int | None,
        typer.Option(min=1, help="Estimate the curvature from so many drawn labels a sample, not class by class."),
    ] = None,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    input_shape: options.InputShape = None,
    classes: options.Classes = None,
    batch_size: options.BatchSize = 64,
    device: options.Device = "auto",
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Measure, by the curvature of the loss, what each channel group of a network is worth."""
    from cahfp_cli.checkpoint.atomic import atomic_file, check_file_target
    from cahfp_cli.commands.networks import check_there, given, open_network
    from cahfp_cli.errors import InputError, UsageError

    console = Console(json, quiet)
    # Slips in what was typed are answered here, before torch is imported.
    check_file_target(output, force)
    check_there(checkpoint)
    if checkpoint.is_dir():
        raise UsageError(f"{checkpoint} is a folder: scores are measured on the global checkpoint.")

    import numpy as np

    from cahfp_cli.coupling.analysis import analyse
    from cahfp_cli.data.dataset import check_fits
    from cahfp_cli.data.spec import load_data
    from cahfp_cli.provenance import portable, provenance
    from cahfp_cli.significance.measure import measure, subset
    from cahfp_cli.significance.registry import find_criterion
    from cahfp_cli.significance.scores import Scores, ScoresMetadata, write_scores
    from cahfp_cli.training.device import pick_device, repeatable, use_threads

    chosen = find_criterion(criterion)
    use_threads(threads)
    where = pick_device(device)
    network = open_network(checkpoint, model, model_arg, input_shape, classes)
    calibration = None
    if chosen.needs_gates:
        dataset = load_data(data, data_root=data_root)
        check_fits(dataset, network.input_shape, network.classes)
        calibration = subset(dataset, samples, seed)
        if len(calibration) < samples:
            console.warn(f"{data} has only {len(calibration)} samples, fewer than --samples {samples}")
    analysis = analyse(network.model, network.input_shape)
    if analysis.groups.count == 0:
        raise InputError(f"{checkpoint}: no channel group of this network can be pruned.")
    network.model.to(where)
    with repeatable(seed, where), console.progress("scoring") as progress:
        found = measure(network.model, analysis.groups, chosen, calibration, batch_size, draws, seed, progress)
    recorded: Json = {"criterion": criterion, "seed": seed}
    if chosen.needs_gates:
        recorded |= given({"data": portable(data), "samples": samples, "draws": draws, "batch_size": batch_size})
    metadata = ScoresMetadata(
        checkpoint=network.digest,
        criterion=criterion,
        samples=found.gates.samples if found.gates else None,
        loss=found.gates.loss if found.gates else None,
        families=analysis.groups.names,
        provenance=provenance("score", recorded, network.files),
    )
    scores = Scores(
        metadata,
        found.significance,
        analysis.groups.family,
        analysis.groups.sizes(),
        found.gates.gradient if found.gates else None,
        found.gates.curvature if found.gates else None,
    )
    with atomic_file(output, force) as temporary:
        write_scores(temporary, scores)
    spread = np.percentile(found.significance, [0, 50, 100])
    families = len(analysis.groups.names)
    console.result(
        f"{output}: {analysis.groups.count} channel groups in {families} families, {criterion} "
        f"from {spread[0]:.3g} to {spread[2]:.3g} (median {spread[1]:.3g})",
        {
            "output": str(output),
            "checkpoint": network.digest,
            "criterion": criterion,
            "groups": analysis.groups.count,
            "families": families,
            "samples": metadata.samples,
            "loss": metadata.loss,
            "significance": {"min": spread[0], "median": spread[1], "max": spread[2]},
        },
    )
