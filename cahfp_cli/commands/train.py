"""`cahfp train`: from scratch, fine-tuning, or a client's own steps on a submodel."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cahfp_cli.commands import options
from cahfp_cli.commands.options import choice
from cahfp_cli.errors import UsageError
from cahfp_cli.output import Console, Json

if TYPE_CHECKING:
    from cahfp_cli.checkpoint.metadata import Provenance
    from cahfp_cli.data.dataset import Dataset
    from cahfp_cli.export.onnx_file import ExportOptions
    from cahfp_cli.library.network import Network
    from cahfp_cli.running.evaluation import Metrics
    from cahfp_cli.training.curvature import Curvature
    from cahfp_cli.training.sgd import TrainReport


def train(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="CHECKPOINT|SUBMODEL_DIR", help="Where to start; without it, from scratch (--model)."),
    ] = None,
    *,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE|FOLDER",
            rich_help_panel=options.OUTPUT,
            help="Checkpoint to write (.safetensors), or for a submodel the folder.",
        ),
    ],
    data: options.Data = "digits@train",
    data_root: options.DataRoot = None,
    test_data: Annotated[
        str | None,
        typer.Option(
            "--test-data",
            metavar="DATA",
            autocompletion=options.offer(*options.DATA_SETS),
            rich_help_panel=options.DATA,
            help="Data to evaluate on at the end, such as digits@test.",
        ),
    ] = None,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    input_shape: options.InputShape = None,
    input_dtype: options.InputDtype = None,
    classes: options.Classes = None,
    key: options.Key = None,
    epochs: Annotated[
        int,
        typer.Option(
            "--epochs",
            metavar="N",
            min=1,
            max=options.MOST,
            rich_help_panel=options.TRAINING,
            help="Passes over the data.",
        ),
    ] = 10,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            metavar="N",
            min=1,
            max=options.MOST,
            rich_help_panel=options.TRAINING,
            help="Number of optimiser steps (batches), in place of --epochs.",
        ),
    ] = None,
    batch_size: options.BatchSize = 64,
    lr: Annotated[
        float,
        typer.Option("--lr", metavar="X", rich_help_panel=options.TRAINING, help="Highest learning rate."),
    ] = 0.05,
    momentum: Annotated[
        float,
        typer.Option(
            "--momentum", metavar="X", rich_help_panel=options.TRAINING, help="Nesterov momentum, from 0 to below 1."
        ),
    ] = 0.9,
    weight_decay: Annotated[
        float,
        typer.Option(
            "--weight-decay",
            metavar="X",
            rich_help_panel=options.TRAINING,
            help="Weight decay of matrices and kernels; biases and normalisation have none.",
        ),
    ] = 5e-4,
    schedule: Annotated[
        str,
        choice(
            "--schedule",
            ("cosine", "constant"),
            options.TRAINING,
            "Learning rate over time: falling to 0 along a cosine, or constant.",
        ),
    ] = "cosine",
    label_smoothing: Annotated[
        float,
        typer.Option(
            "--label-smoothing",
            metavar="SHARE",
            parser=options.number_or_percentage,
            rich_help_panel=options.TRAINING,
            help="Share of a label that is spread over all classes (0.1 or 10%).",
        ),
    ] = 0.0,
    augment: Annotated[
        bool,
        typer.Option(
            "--augment", rich_help_panel=options.TRAINING, help="Augmentation: shift images by a few random pixels."
        ),
    ] = False,
    grad_clip: Annotated[
        float | None,
        typer.Option(
            "--grad-clip",
            metavar="X",
            rich_help_panel=options.TRAINING,
            help="Scale gradients down to this norm; without it they are left as they are.",
        ),
    ] = None,
    curvature: Annotated[
        int | None,
        typer.Option(
            "--curvature",
            metavar="N",
            min=1,
            max=options.MOST,
            rich_help_panel=options.OUTPUT,
            help="For a submodel: also measure the curvature of the loss, on N samples, for "
            "reconstruct --rule curvature.",
        ),
    ] = None,
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx/--no-onnx",
            rich_help_panel=options.OUTPUT,
            help="For a submodel: write the trained network as model.onnx too, or do not.",
        ),
    ] = True,
    opset: options.Opset = 18,
    device: options.Device = "auto",
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Train a network from scratch, fine-tune a checkpoint, or train a submodel on a device's own data."""
    from cahfp_cli.checkpoint.atomic import check_file_target, check_folder_target
    from cahfp_cli.commands.networks import check_there
    from cahfp_cli.data.spec import load_data
    from cahfp_cli.formats.files import is_submodel_folder
    from cahfp_cli.provenance import given
    from cahfp_cli.pruning.ownership import foreign_in_submodel

    console = Console(json, quiet)
    # Slips in what was typed are answered here, before torch is imported and long before training ends.
    if source is not None:
        check_there(source)
    if curvature is not None and (source is None or not is_submodel_folder(source)):
        raise UsageError("--curvature goes with a SUBMODEL_DIR: it is what a device says beside its trained submodel.")
    if source is not None and is_submodel_folder(source):
        check_folder_target(output, force, foreign_in_submodel)
    else:
        check_file_target(output, force)
    dataset = load_data(data, data_root=data_root)
    tests = load_data(test_data, data_root=data_root, default_split="test") if test_data else None

    from cahfp_cli.library.network import check_data, save_network
    from cahfp_cli.models.tensors import check_can_be_saved
    from cahfp_cli.provenance import portable, provenance
    from cahfp_cli.running.device import pick_device, use_threads
    from cahfp_cli.running.evaluation import evaluate
    from cahfp_cli.training.curvature import measure_curvature
    from cahfp_cli.training.sgd import TrainOptions, check_options
    from cahfp_cli.training.sgd import train as run

    how = TrainOptions(
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule="cosine" if schedule == "cosine" else "constant",
        label_smoothing=label_smoothing,
        augment=augment,
        seed=seed,
        grad_clip=grad_clip,
    )
    check_options(how)
    use_threads(threads)
    where = pick_device(device)
    network = start(source, dataset, model, model_arg, input_shape, input_dtype, classes, key, seed, console)
    check_can_be_saved(network.model)
    for each in (dataset, tests):
        if each is not None:
            check_data(each, network)

    exporting = None
    if onnx and network.submodel is not None:
        from cahfp_cli.export.onnx_file import ExportOptions

        exporting = ExportOptions(dataset.x, seed, opset)
        check_exports(network, exporting)

    with console.progress("training") as progress:

        def on_epoch(done: int, total: int, epoch: Any) -> None:
            progress(done, total)
            console.note(f"epoch {done}/{total}: loss {epoch.loss:.4f}, accuracy {100 * epoch.accuracy:.1f}%")

        report = run(network.model, dataset, how, where, on_epoch)
    metrics = evaluate(network.model, tests, 256, where) if tests is not None else None
    measured = None
    if curvature is not None and network.submodel is not None:
        from cahfp_cli.formats.index_map import weights_of

        if len(dataset) < curvature:
            console.warn(f"{data} has only {len(dataset)} samples, fewer than --curvature {curvature}")
        names = sorted(weights_of(network.submodel.index_map))
        with console.progress("measuring the curvature") as progress:
            measured = measure_curvature(
                network.model, names, dataset, curvature, where, seed=seed, on_progress=progress
            )
    network.model.cpu()
    options_given = given(
        {
            "data": portable(data),
            "model": portable(model) if model else None,
            "epochs": epochs if steps is None else None,
            "steps": steps,
            "batch_size": batch_size,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "schedule": schedule,
            "label_smoothing": label_smoothing,
            "augment": augment,
            "grad_clip": grad_clip,
            "curvature": curvature,
            "opset": opset if exporting is not None and opset != 18 else None,
        }
    )
    origin = provenance("train", {**options_given, "seed": seed}, network.files)
    result = describe(dataset, test_data, report, metrics, measured)
    if network.submodel is None:
        save_network(network, output, origin, len(dataset), force)
    else:
        result = write_trained_submodel(output, network, len(dataset), origin, force, exporting, result, measured)
    lines = [f"{output}: {len(dataset)} samples, final training loss {result['training']['loss']:.4f}"]
    if metrics is not None:
        lines.append(f"accuracy on {test_data}: {100 * metrics.accuracy:.1f}% ({metrics.samples} samples)")
    console.result("\n".join(lines), {"output": str(output), **result})


def start(
    source: Path | None,
    dataset: "Dataset",
    model: str | None,
    model_arg: list[str] | None,
    input_shape: str | None,
    input_dtype: str | None,
    classes: int | None,
    key: str | None,
    seed: int,
    console: Console,
) -> "Network":
    """The network to train: the given one, or a new one that fits the data."""
    from cahfp_cli.checkpoint.metadata import ModelSpec
    from cahfp_cli.commands.networks import open_network, parse_dtype, parse_shape
    from cahfp_cli.library.network import Network
    from cahfp_cli.models.checkpoint_io import unsaved_remarks
    from cahfp_cli.models.spec import build, parse_model_args

    if source is not None:
        return open_network(
            source, model, model_arg, input_shape, input_dtype, classes, dataset.input_dtype, key, warn=console.warn
        )
    if model is None:
        raise UsageError(
            "pass a CHECKPOINT to go on from, or --model SPEC to train from scratch, e.g. --model resnet20"
        )
    spec = ModelSpec(spec=model, args=parse_model_args(model_arg or []))
    shape = parse_shape(input_shape) or dataset.input_shape
    dtype = parse_dtype(input_dtype) or dataset.input_dtype
    outputs = classes or dataset.classes
    network = build(spec, shape, outputs, seed)
    for remark in unsaved_remarks(network):
        console.warn(remark)
    return Network(network, spec, shape, dtype, outputs, "", (), {}, None)


def check_exports(network: "Network", exporting: "ExportOptions") -> None:
    """Raises: VerificationError: a submodel has no ONNX file yet and cannot have one; said before it is trained."""
    from tempfile import TemporaryDirectory

    from cahfp_cli.export.onnx_file import export_onnx
    from cahfp_cli.export.opset import DEFAULT_OPSET
    from cahfp_cli.formats.files import ONNX
    from cahfp_cli.models.inputs import torch_type

    assert network.submodel is not None
    if (network.submodel.folder / ONNX).is_file() and exporting.opset == DEFAULT_OPSET:
        return
    with TemporaryDirectory(prefix="cahfp.") as folder:
        dtype = torch_type(network.input_dtype)
        export_onnx(network.model, network.input_shape, Path(folder) / ONNX, {}, dtype=dtype, options=exporting)


def describe(
    dataset: "Dataset",
    test_data: str | None,
    report: "TrainReport",
    metrics: "Metrics | None",
    curvature: "Curvature | None",
) -> Json:
    """What training did, for report.json and --json; no times, so that equal runs give equal bytes."""
    from cahfp_cli.provenance import portable

    last = report.epochs[-1]
    result: Json = {
        "num_examples": len(dataset),
        "training": {
            "data": portable(dataset.name),
            "steps": report.steps,
            "loss": last.loss,
            "accuracy": last.accuracy,
        },
    }
    if curvature is not None:
        result["training"]["curvature"] = {"samples": curvature.samples, "draws": curvature.draws}
    if metrics is not None:
        result["test"] = {
            "data": portable(test_data or ""),
            "accuracy": metrics.accuracy,
            "loss": metrics.loss,
            "samples": metrics.samples,
        }
    return result


def write_trained_submodel(
    output: Path,
    network: "Network",
    examples: int,
    origin: "Provenance",
    force: bool,
    exporting: "ExportOptions | None",
    result: Json,
    curvature: "Curvature | None",
) -> Json:
    """A submodel folder again: trained tensors, the same index map, a new ONNX file, the report carried on, and the
    curvature if it was measured; an old one is of other weights and stays behind."""
    from cahfp_cli.export.onnx_file import DEFAULTS
    from cahfp_cli.formats.files import CURVATURE, REPORT
    from cahfp_cli.formats.report import read_report
    from cahfp_cli.pruning.submodel import trained_arrays, write_submodel
    from cahfp_cli.training.curvature import write_curvature

    submodel = network.submodel
    assert submodel is not None
    metadata = submodel.metadata.model_copy(update={"num_examples": examples, "provenance": origin})
    before = submodel.folder / REPORT
    report = {key: value for key, value in read_report(before).items() if key != "onnx"} if before.is_file() else {}

    def write_more(folder: Path) -> None:
        if curvature is not None:
            write_curvature(folder / CURVATURE, curvature, checkpoint=metadata.checkpoint, provenance=origin)

    return write_submodel(
        output,
        network.model,
        trained_arrays(network.model, submodel.index_map),
        submodel.index_map,
        metadata,
        {**report, **result},
        onnx=exporting is not None,
        exporting=exporting or DEFAULTS,
        write_more=write_more,
        force=force,
    )
