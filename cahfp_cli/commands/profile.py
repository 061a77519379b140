"""`cahfp profile`: the devices that there are, and every figure behind one of them."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cahfp_cli.commands import options
from cahfp_cli.commands.helping import Command, Group
from cahfp_cli.errors import UsageError
from cahfp_cli.output import Console, table

if TYPE_CHECKING:
    from torch import nn

    from cahfp_cli.checkpoint.metadata import InputDtype
    from cahfp_cli.device.profile import DefaultBudget, DeviceProfile

NAME_PATTERN = r"[a-z0-9]+(-[a-z0-9]+)*"

app = typer.Typer(
    cls=Group, help="Show, measure and apply device profiles.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("list", cls=Command)
def list_profiles(json: options.Json = False) -> None:
    """List the profiles that come with cahfp."""
    from cahfp_cli.device.catalogue import all_profiles

    profiles = all_profiles()
    columns = ("name", "aliases", "peak fp32", "memory bandwidth", "RAM", "default budget")
    rows = [
        (
            profile.name,
            ", ".join(profile.aliases),
            _amount(profile.compute.fp32.peak),
            _amount(profile.memory.bandwidth),
            _amount(profile.capacity.ram),
            _budget(profile.budget),
        )
        for profile in profiles
    ]
    Console(json=json).result(table(columns, rows), {"profiles": [_machine(profile) for profile in profiles]})


@app.command(cls=Command)
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            autocompletion=options.profiles,
            help="Name or alias of a profile, or a path to a .toml file.",
        ),
    ],
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            rich_help_panel=options.OUTPUT,
            help="Draw its roofline (speed by arithmetic intensity) into this file (.png, .svg or .pdf).",
        ),
    ] = None,
    json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Show every figure of one profile with its unit and its source."""
    from cahfp_cli.device.catalogue import load_profile

    profile = load_profile(name)
    if plot is not None:
        draw(profile, plot, force)
    Console(json=json).result(_page(profile), _machine(profile))


@app.command(cls=Command)
def predict(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            autocompletion=options.offer(*options.MODELS),
            help="A checkpoint, a submodel folder or an ONNX file in one, or a model spec such as resnet20.",
        ),
    ],
    *,
    profile: Annotated[
        str,
        typer.Option(
            "--profile",
            metavar="NAME|FILE",
            autocompletion=options.profiles,
            rich_help_panel=options.RUNTIME,
            help="Device to predict for: name or alias of a profile, or a .toml file.",
        ),
    ],
    measured: Annotated[
        bool,
        typer.Option(
            "--measure",
            rich_help_panel=options.RUNTIME,
            help="Also time it on this machine, in ONNX Runtime with as many threads as the profile says.",
        ),
    ] = False,
    spec: options.Model = None,
    model_arg: options.ModelArg = None,
    input_shape: options.InputShape = None,
    input_dtype: options.InputDtype = None,
    classes: options.Classes = None,
    key: options.Key = None,
    json: options.Json = False,
) -> None:
    """Predict latency, memory and storage of a network on a device, operator by operator; an ONNX file in fp32."""
    import numpy as np

    from cahfp_cli.coupling.analysis import analyse
    from cahfp_cli.device.catalogue import load_profile
    from cahfp_cli.device.cost import compile_workload
    from cahfp_cli.device.derived import derived
    from cahfp_cli.device.quantities import format_bytes, format_count, format_seconds
    from cahfp_cli.device.workload import make_workload
    from cahfp_cli.models.inputs import torch_type
    from cahfp_cli.models.tensors import saved_state

    device = load_profile(profile)
    network, shape, dtype = _network(model, spec, model_arg, input_shape, input_dtype, classes, key)
    itemsizes = {name: tensor.element_size() for name, tensor in saved_state(network).items()}
    workload = make_workload(analyse(network, shape, torch_type(dtype)), itemsizes)
    compiled = compile_workload(workload, device)
    widths = np.asarray(workload.full_widths)
    cost, parts = compiled.cost(widths), compiled.breakdown(widths)
    assert cost.latency_seconds is not None
    timed = [i for i, operator in enumerate(workload.operators) if operator.kind != "free"]
    operators = [
        {
            "name": parts.names[i],
            "kind": workload.operators[i].kind,
            "seconds": float(parts.seconds[i]),
            "bound": "compute" if parts.compute[i] >= parts.memory[i] else "memory",
        }
        for i in timed
    ]
    total, further = float(cost.latency_seconds), derived(cost, device)
    machine = {
        "model": model,
        "profile": device.name,
        "latency_seconds": total,
        "memory_bytes": int(cost.memory_bytes),
        "storage_bytes": int(cost.storage_bytes),
        "macs": int(cost.macs),
        "params": int(cost.params),
        **asdict(further),
        "operators": operators,
        "not_modelled": list(workload.unmodelled),
    }
    seconds = _measured(network, shape, dtype, model, device.runtime.threads) if measured else None
    if seconds is not None:
        machine["measured_seconds"] = seconds
    rows = [
        [
            str(o["name"]),
            str(o["kind"]),
            format_seconds(parts.seconds[i]),
            f"{parts.seconds[i] / total:.1%}",
            str(o["bound"]),
        ]
        for i, o in zip(timed, operators, strict=True)
    ]
    human = table(("operator", "kind", "time", "share", "bound by"), rows) + (
        f"\n\n{device.name}: {format_seconds(total)} at batch 1, {format_bytes(float(cost.memory_bytes))} memory, "
        f"{format_bytes(float(cost.storage_bytes))} storage, {format_count(float(cost.macs))} MACs, "
        f"{format_count(float(cost.params))} params"
        f"\ntraining: {format_seconds(further.training_step_seconds)} a sample, "
        f"{format_bytes(further.training_memory_bytes)} at batch 1; upload {format_seconds(further.upload_seconds)}, "
        f"download {format_seconds(further.download_seconds)}"
    )
    if further.energy_joules is not None:
        human += f"; {further.energy_joules * 1e3:.3g} mJ an inference"
    if workload.unmodelled:
        human += f"\nnot modelled, taken for copies: {', '.join(workload.unmodelled)}"
    if seconds is not None:
        human += f"\nmeasured here: {format_seconds(seconds)}, predicted {total / seconds - 1:+.1%}"
    Console(json=json).result(human, machine)


@app.command(cls=Command)
def measure(
    *,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", rich_help_panel=options.OUTPUT, help="Profile to write, a .toml file."
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            rich_help_panel=options.OUTPUT,
            help="Name of the profile; without it, that of the file without .toml.",
        ),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(
            "--threads",
            metavar="N",
            min=1,
            max=options.MOST_THREADS,
            rich_help_panel=options.RUNTIME,
            help="CPU threads that ONNX Runtime computes with.",
        ),
    ] = 1,
    uplink: Annotated[
        float,
        typer.Option(
            "--uplink",
            metavar="MBIT/S",
            min=0.001,
            callback=options.finite,
            rich_help_panel=options.RUNTIME,
            help="Speed of sending to the server, in Mbit/s: recorded, not measured.",
        ),
    ] = 20.0,
    downlink: Annotated[
        float,
        typer.Option(
            "--downlink",
            metavar="MBIT/S",
            min=0.001,
            callback=options.finite,
            rich_help_panel=options.RUNTIME,
            help="Speed of receiving from the server, in Mbit/s: recorded, not measured.",
        ),
    ] = 100.0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Measure this machine with ONNX Runtime and write a calibrated profile; takes less than a minute."""
    import numpy as np

    from cahfp_cli.checkpoint.atomic import atomic_file, check_file_target
    from cahfp_cli.device.quantities import format_seconds

    console = Console(json, quiet)
    named = name or output.stem
    if output.suffix != ".toml":
        raise UsageError(f"{output}: a profile's file ends in .toml")
    if not re.fullmatch(NAME_PATTERN, named):
        raise UsageError(f"{named}: a profile's name has a-z, 0-9 and single hyphens only; pass --name")
    check_file_target(output, force)

    from cahfp_cli.device.measurement import measure_device, profile_toml

    links = {
        key: {"value": value, "unit": "Mbit/s", "source": "given to `cahfp profile measure`, or its default"}
        for key, value in (("uplink", uplink), ("downlink", downlink))
    }
    with console.progress("measuring") as progress:
        measured = measure_device(named, threads, links, progress)
    with atomic_file(output, force) as temporary:
        temporary.write_text(profile_toml(measured), encoding="utf-8")
    errors = np.abs(measured.fit.residuals)
    worst = np.argsort(-errors)[:5]
    rows = [
        [measured.names[i], format_seconds(measured.seconds[i]), f"{measured.fit.residuals[i]:+.1%}"] for i in worst
    ]
    human = (
        f"{output}: {measured.profile.description}\n{_page(measured.profile)}\n\n"
        f"{len(errors)} microbenchmarks: median error {np.median(errors):.1%}, 90% within "
        f"{np.quantile(errors, 0.9):.1%}; the worst explained:\n{table(('microbenchmark', 'time', 'error'), rows)}"
    )
    machine = {
        "output": str(output),
        "profile": _machine(measured.profile),
        "residuals": dict(zip(measured.names, measured.fit.residuals.tolist(), strict=True)),
    }
    console.result(human, machine)


def draw(profile: DeviceProfile, plot: Path, force: bool) -> None:
    """Draw a profile's roofline. Raises: UsageError: `plot` names no kind of figure, or matplotlib is not installed."""
    from cahfp_cli.checkpoint.atomic import check_file_target

    try:
        from cahfp_cli.plots.figure_file import figure_suffix, save_figure
        from cahfp_cli.plots.roofline import draw_roofline
    except ModuleNotFoundError as error:
        raise UsageError(f"--plot needs {error.name}, which is not installed: pip install 'cahfp[plots]'") from error
    figure_suffix(plot)
    check_file_target(plot, force)
    save_figure(draw_roofline(profile), plot, force)


def _network(
    model: str,
    spec: str | None,
    model_arg: list[str] | None,
    input_shape: str | None,
    input_dtype: str | None,
    classes: int | None,
    key: str | None,
) -> tuple[nn.Module, tuple[int, ...], InputDtype]:
    """The network that MODEL names, with the shape and type of a sample: a path that exists, or a spec built with
    `--input-shape`, `--input-dtype` and `--classes`."""
    from cahfp_cli.checkpoint.metadata import ModelSpec
    from cahfp_cli.commands.networks import open_network, parse_dtype, parse_shape
    from cahfp_cli.formats.files import TENSORS
    from cahfp_cli.models.spec import build, parse_model_args

    path = Path(model)
    if path.exists() and path.suffix != ".py":
        if path.suffix == ".onnx":
            path = path.parent
            if not (path / TENSORS).is_file():
                raise UsageError(f"{model}: no {TENSORS} beside it; give the checkpoint that it was made from.")
        network = open_network(path, spec, model_arg, input_shape, input_dtype, classes, key=key, warn=Console().warn)
        return network.model, network.input_shape, network.input_dtype
    shape = parse_shape(input_shape)
    if shape is None:
        raise UsageError(f"{model} is not a file, so it is taken as a model spec: pass --input-shape, e.g. 3x32x32")
    named = ModelSpec(spec=model, args=parse_model_args(model_arg or []))
    return build(named, shape, classes or 10), shape, parse_dtype(input_dtype) or "float32"


def _measured(network: nn.Module, shape: tuple[int, ...], dtype: InputDtype, model: str, threads: int) -> float:
    """Seconds of a call on this machine: of the ONNX file that MODEL names, or of the network as one."""
    from cahfp_cli.library.clock import seconds_here
    from cahfp_cli.running.stopwatch import seconds_a_call

    if model.endswith(".onnx"):
        return seconds_a_call(Path(model), threads)
    return seconds_here(network, shape, dtype, threads)


def _page(profile: DeviceProfile) -> str:
    figures = list(profile.figures())
    rows = table(("figure", "value"), [(key, _amount(figure)) for key, figure in figures]).splitlines()
    sources = ["  source", "  ------", *(f"  {figure.source}" for _, figure in figures)]
    width = max(map(len, rows))
    runtime = profile.runtime
    threads = f"{runtime.threads} thread{'s' if runtime.threads > 1 else ''}"
    return "\n".join(
        [
            f"{profile.name}: {profile.description}",
            f"aliases: {', '.join(profile.aliases) or 'none'}",
            f"runtime: {', '.join(part for part in (runtime.name, runtime.provider, threads) if part)}",
            f"default budget: {_budget(profile.budget)}" + (f" ({profile.budget.reason})" if profile.budget else ""),
            "",
            *(row.ljust(width) + source for row, source in zip(rows, sources, strict=True)),
        ]
    )


def _amount(figure: Any) -> str:
    return f"{figure.value:g}" if figure.unit == "share" else f"{figure.value:g} {figure.unit}"


def _budget(budget: DefaultBudget | None) -> str:
    from cahfp_cli.device.quantities import format_bytes, format_limit, format_seconds

    if budget is None:
        return "none"
    parts = (
        ("latency", format_seconds(budget.latency) if budget.latency is not None else None),
        ("memory", format_bytes(budget.memory) if budget.memory is not None else None),
        ("storage", format_bytes(budget.storage) if budget.storage is not None else None),
        ("macs", format_limit(budget.macs) if budget.macs is not None else None),
        ("params", format_limit(budget.params) if budget.params is not None else None),
        ("keep", f"{budget.keep * 100:.3g}%" if budget.keep is not None else None),
    )
    return ", ".join(f"{name} {value}" for name, value in parts if value is not None)


def _machine(profile: DeviceProfile) -> dict[str, Any]:
    """The profile as JSON: what the file holds, with the budget in seconds and bytes."""
    return profile.model_dump(mode="json", exclude_none=True)
