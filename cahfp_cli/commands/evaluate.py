"""`cahfp evaluate`: accuracy, loss, latency and size of anything we write."""

from pathlib import Path
from typing import Annotated

import typer

from cahfp_cli.commands import options
from cahfp_cli.errors import UsageError
from cahfp_cli.output import Console


def evaluate(
    network: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT|SUBMODEL_DIR|MODEL.onnx",
            help="What to evaluate: a checkpoint, a submodel folder or an ONNX file.",
        ),
    ],
    *,
    data: options.Data = "digits@test",
    data_root: options.DataRoot = None,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    input_shape: options.InputShape = None,
    input_dtype: options.InputDtype = None,
    classes: options.Classes = None,
    key: options.Key = None,
    batch_size: options.BatchSize = 256,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency/--no-latency",
            rich_help_panel=options.RUNTIME,
            help="Time single samples on this machine, or do not.",
        ),
    ] = True,
    device: options.Device = "auto",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure accuracy and loss on data, and on this machine latency and size."""
    from cahfp_cli.commands.networks import check_there, open_network
    from cahfp_cli.data.spec import load_data

    # Slips in what was typed are answered here, before torch is imported.
    console = Console(json, quiet)
    check_there(network)
    dataset = load_data(data, data_root=data_root, default_split="test")

    from cahfp_cli.device.quantities import format_bytes, format_seconds
    from cahfp_cli.export.side_file import size_of_file
    from cahfp_cli.library.network import check_data
    from cahfp_cli.models.inputs import torch_type
    from cahfp_cli.running import evaluation
    from cahfp_cli.running.device import pick_device, use_threads
    from cahfp_cli.running.latency import latency as time_network
    from cahfp_cli.running.latency import latency_onnx

    use_threads(threads)
    if network.suffix == ".onnx":
        if device not in ("auto", "cpu"):
            raise UsageError(f"--device {device}: ONNX files are evaluated on the CPU.")
        metrics = evaluation.evaluate_onnx(network, dataset, batch_size, threads)
        timing = latency_onnx(network, threads) if latency else None
        size = size_of_file(network)
    else:
        where = pick_device(device)
        opened = open_network(
            network, model, model_arg, input_shape, input_dtype, classes, dataset.input_dtype, key, warn=console.warn
        )
        check_data(dataset, opened)
        metrics = evaluation.evaluate(opened.model, dataset, batch_size, where)
        dtype = torch_type(opened.input_dtype)
        timing = time_network(opened.model, opened.input_shape, where, dtype=dtype) if latency else None
        weights = opened.files if opened.submodel is None else opened.files[:1]  # all shards; without the index map
        size = sum(file.stat().st_size for file in weights)
    lines = [
        f"accuracy  {100 * metrics.accuracy:.2f}% ({metrics.samples} samples of {data})",
        f"loss      {metrics.loss:.4f}",
        f"size      {format_bytes(size)}",
    ]
    result = {
        "network": str(network),
        "data": data,
        "samples": metrics.samples,
        "accuracy": metrics.accuracy,
        "loss": metrics.loss,
        "bytes": size,
    }
    if timing is not None:
        p90 = format_seconds(timing.p90_ms / 1e3)
        lines.append(f"latency   {format_seconds(timing.median_ms / 1e3)} median, {p90} p90 (this machine, batch 1)")
        result["latency"] = {"median_seconds": timing.median_ms / 1e3, "p90_seconds": timing.p90_ms / 1e3}
    console.result("\n".join(lines), result)
