"""`cahfp prune`: one submodel for each device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from cahfp_cli.commands import options
from cahfp_cli.commands.options import choice
from cahfp_cli.errors import UsageError
from cahfp_cli.output import Console, Json, table

if TYPE_CHECKING:
    from cahfp_cli.data.dataset import Dataset
    from cahfp_cli.device.profile import DeviceProfile
    from cahfp_cli.export.quantised import Dtype, Quantisation
    from cahfp_cli.pruning.budget import Budget
    from cahfp_cli.significance.scores import Scores


T = TypeVar("T")
SelectionName = Literal["linear", "quadratic", "independent"]
DTYPES = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class Target:
    """What one device asks for: the folder to write, its profile (None when only flags say what must hold), limits."""

    folder: Path
    profile: "DeviceProfile | None"
    budget: "Budget"

    @property
    def name(self) -> str | None:
        return self.profile.name if self.profile else None


def prune(
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
            metavar="FOLDER",
            rich_help_panel=options.OUTPUT,
            help="Folder to write: with --profile, in it a submodel folder for each; without, the submodel folder.",
        ),
    ],
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores",
            metavar="FILE",
            rich_help_panel=options.SELECTION,
            help="What `cahfp score` wrote for this checkpoint; not needed with --calibration.",
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            metavar="NAME|FILE",
            autocompletion=options.profiles,
            rich_help_panel=options.BUDGET,
            help="Device to prune for: a name (see `cahfp profile list`) or a .toml file. Its own budget holds unless "
            "limits are given.",
        ),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(
            "--latency",
            metavar="SECONDS",
            rich_help_panel=options.BUDGET,
            help="Limit of the time for one sample, as predicted for the profile, such as 5ms.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="BYTES",
            rich_help_panel=options.BUDGET,
            help="Limit of the RAM for weights and for activations of one sample, such as 64MB.",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="BYTES",
            rich_help_panel=options.BUDGET,
            help="Limit of the size of the ONNX file (fp32), such as 2MB.",
        ),
    ] = None,
    macs: Annotated[
        str | None,
        typer.Option(
            "--macs",
            metavar="SHARE|MACS",
            rich_help_panel=options.BUDGET,
            help="Limit of multiply-accumulate operations for one sample: a share of the full network's (0.5 or 50%) "
            "or a number (30M).",
        ),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(
            "--params",
            metavar="SHARE|N",
            rich_help_panel=options.BUDGET,
            help="Limit of parameters: a share of the full network's (0.3 or 30%) or a number (1.2M).",
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            metavar="SHARE",
            rich_help_panel=options.BUDGET,
            help="Share of the channels that every layer keeps (0.5 or 50%).",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="PATTERN",
            rich_help_panel=options.SELECTION,
            help="Layers that keep all channels, such as 'layer1.*'; names as under `widths` in a report.",
        ),
    ] = None,
    min_width: Annotated[
        int,
        typer.Option(
            "--min-width",
            metavar="N",
            min=1,
            max=options.MOST,
            rich_help_panel=options.SELECTION,
            help="Fewest channel groups that a layer keeps.",
        ),
    ] = 1,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            rich_help_panel=options.BUDGET,
            help="This machine is the device: measure the latency, and prune again until it holds.",
        ),
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="DATA",
            autocompletion=options.offer(*options.DATA_SETS),
            rich_help_panel=options.CALIBRATION,
            help="Samples like those that the device will see, such as digits@train: channels are chosen on them, and "
            "the weights that remain are adapted. Labels are not needed.",
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            metavar="N",
            min=1,
            max=options.MOST,
            rich_help_panel=options.CALIBRATION,
            help="Most samples to take from --calibration, drawn at random.",
        ),
    ] = 2048,
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds",
            metavar="N",
            min=1,
            max=options.MOST,
            rich_help_panel=options.CALIBRATION,
            help="Prune in N steps, and measure gradients and curvature anew before each; more is slower and better.",
        ),
    ] = 15,
    selection: Annotated[
        str,
        choice(
            "--selection",
            ("auto", "linear", "quadratic", "independent"),
            options.SELECTION,
            "How channel groups are chosen: as a set on --calibration, by a linear or quadratic model of the outputs, "
            "or each by its own score. auto is linear with --calibration, else independent.",
        ),
    ] = "auto",
    reference: Annotated[
        str,
        choice(
            "--reference",
            ("network", "labels"),
            options.CALIBRATION,
            "What the pruned network should predict: what the full one does, or the labels of --calibration.",
        ),
    ] = "network",
    compensate: Annotated[
        bool,
        typer.Option(
            "--compensate/--no-compensate",
            rich_help_panel=options.CALIBRATION,
            help="Scale the channels that remain so that they make up for the removed ones.",
        ),
    ] = True,
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate",
            rich_help_panel=options.CALIBRATION,
            help="Measure the statistics of batch normalisation anew on --calibration.",
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            autocompletion=options.offer(*options.DATA_SETS),
            rich_help_panel=options.DATA,
            help="Report the accuracy before and after on this data, such as digits@test.",
        ),
    ] = None,
    data_root: options.DataRoot = None,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    input_shape: options.InputShape = None,
    input_dtype: options.InputDtype = None,
    classes: options.Classes = None,
    key: options.Key = None,
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx/--no-onnx", rich_help_panel=options.OUTPUT, help="Write model.onnx and check it, or do not."
        ),
    ] = True,
    opset: options.Opset = 18,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            metavar="|".join(DTYPES),
            autocompletion=options.offer(*DTYPES),
            rich_help_panel=options.OUTPUT,
            help="Write another ONNX file in this type beside model.onnx, which is fp32.",
        ),
    ] = None,
    batch_size: options.BatchSize = 64,
    device: options.Device = "auto",
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
) -> None:
    """Cut one submodel for each device: compact weights, index map, ONNX file and report."""
    from cahfp_cli.commands.networks import check_global, open_network
    from cahfp_cli.device.catalogue import load_profile
    from cahfp_cli.significance.scores import read_scores

    # Slips in what was typed are answered here, before torch is imported.
    console = Console(json, quiet)
    profiles = [load_profile(name) for name in profile or []]
    budget = parse_budget(latency, memory, storage, macs, params, keep)
    targets = make_targets(profiles, budget, output)
    if verify and not (onnx and len(targets) == 1 and targets[0].budget.latency is not None):
        raise UsageError("--verify needs one --profile, that of this machine, a latency to hold, and the ONNX file.")
    chosen = check_selection(selection, reference, calibration, recalibrate, scores)
    dtypes = check_dtypes(dtype or [], profiles, onnx, calibration, data)
    check_targets(targets, output, force)
    check_global(checkpoint, "prune the global checkpoint")
    scored = read_scores(scores) if scores is not None else None
    for warning in without_influence(chosen, calibration, scored):
        console.warn(warning)

    from cahfp_cli.data.spec import load_data
    from cahfp_cli.library.prune import before, choose, choose_verified, cut_out
    from cahfp_cli.library.pruning_job import Demand, Pruning, prepare
    from cahfp_cli.library.submodel import save_submodel
    from cahfp_cli.provenance import given
    from cahfp_cli.running.device import use_threads

    use_threads(threads)
    dataset = load_data(data, data_root=data_root, default_split="test") if data is not None else None
    found = load_data(calibration, data_root=data_root) if calibration is not None else None
    of_input = scored.metadata.input_dtype if scored is not None else found.input_dtype if found is not None else None
    network = open_network(
        checkpoint, model, model_arg, input_shape, input_dtype, classes, of_input, key, warn=console.warn
    )
    how = Pruning(
        selection=chosen,
        samples=samples,
        rounds=rounds,
        compensate=compensate,
        reference="labels" if reference == "labels" else "network",
        recalibrate=recalibrate,
        exclude=tuple(exclude or ()),
        min_width=min_width,
        batch_size=batch_size,
        opset=opset,
        device=device,
        seed=seed,
    )
    job = prepare(network, scored, how, found, dataset, console.warn, scores)
    if "int8" in dtypes:
        warn_without_vnni(console)
    demands = [Demand(target.budget, target.profile) for target in targets]
    selections, verified = [], None
    with console.progress("selecting") as progress:
        for number, demand in enumerate(demands):
            part = steps_of(progress, number, len(demands))
            if verify:
                verified = choose_verified(job, demand, part)
                selections.append(verified.selection)
            else:
                selections.append(choose(job, demand, part))
    for warning in dict.fromkeys(warning for picked in selections for warning in picked.warnings):
        console.warn(warning)

    full = before(job)
    asked = given(
        {"latency": latency, "memory": memory, "storage": storage, "macs": macs, "params": params, "keep": keep}
    )
    asked |= given({"dtype": list(dtypes) or None, "opset": opset if onnx and opset != 18 else None})
    reports: list[Json] = []
    with console.progress("pruning") as progress:
        for target, demand, picked in zip(targets, demands, selections, strict=True):
            submodel = cut_out(job, demand, picked, full, asked)
            if verified is not None:
                measured = {"latency_seconds": verified.seconds, "tries": verified.tries}
                submodel = replace(submodel, report={**submodel.report, "measured": measured})
            report = dict(submodel.report)
            if not dry_run:
                if target.folder != output:
                    output.mkdir(exist_ok=True)
                made = quantisations(dtypes, target.profile, job.calibration, dataset, seed)
                report = save_submodel(submodel, target.folder, onnx=onnx, quantised=made, force=force)
                note_file(console, target.folder, report)
            reports.append({"folder": str(target.folder), **report})
            progress(len(reports), len(targets))
    outcome = "nothing written (--dry-run)" if dry_run else f"wrote {', '.join(r['folder'] for r in reports)}"
    if job.unmodelled:
        console.warn(f"no cost model knows these, which count as copies: {', '.join(job.unmodelled)}")
    console.result(f"{human(reports)}\n\n{outcome}", {"written": not dry_run, "submodels": reports})


def parse_budget(
    latency: str | None, memory: str | None, storage: str | None, macs: str | None, params: str | None, keep: str | None
) -> "Budget":
    """The budget flags. Raises: UsageError: one of them is not a quantity."""
    from cahfp_cli.device.quantities import parse_bytes, parse_limit, parse_seconds, parse_share
    from cahfp_cli.pruning.budget import Budget

    return Budget(
        latency=parsed("--latency", latency, parse_seconds),
        memory=parsed("--memory", memory, parse_bytes),
        storage=parsed("--storage", storage, parse_bytes),
        macs=parsed("--macs", macs, parse_limit),
        params=parsed("--params", params, parse_limit),
        keep=parsed("--keep", keep, parse_share),
    )


def parsed(flag: str, text: str | None, parse: Callable[[str], T]) -> T | None:
    """The value of a flag, None without it. Raises: UsageError: not a quantity; the flag is named."""
    try:
        return None if text is None else parse(text)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from None


def make_targets(profiles: Sequence["DeviceProfile"], budget: "Budget", output: Path) -> list[Target]:
    """One target a profile; flags hold for all of them, and without flags each profile's own budget does.

    Raises: UsageError: nothing limits the size, a latency has no device to hold on, or a profile is named twice.
    """
    from cahfp_cli.pruning.budget import budget_of_profile

    if not profiles:
        if budget.latency is not None:
            raise UsageError("--latency needs --profile NAME: time depends on the device (see `cahfp profile list`)")
        if not budget:
            raise UsageError("say what must hold: --profile NAME, or a budget such as --macs 0.5 or --keep 0.5")
        return [Target(output, None, budget)]
    names = [profile.name for profile in profiles]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"profile {twice} is named twice (aliases count): each writes a folder of its name")
    targets = []
    for profile in profiles:
        if not budget and profile.budget is None:
            raise UsageError(f"profile {profile.name} has no budget of its own: pass one, such as --latency 5ms")
        own = budget_of_profile(profile.budget) if profile.budget is not None else budget
        targets.append(Target(output / profile.name, profile, budget or own))
    return targets


def check_targets(targets: Sequence[Target], output: Path, force: bool) -> None:
    """Raises: InputError: a folder exists without `force` or must not be replaced, or cannot be written."""
    from cahfp_cli.checkpoint.atomic import check_folder_target
    from cahfp_cli.pruning.ownership import foreign_in_submodel

    for target in targets:
        folder = target.folder if target.folder.parent.exists() else output
        check_folder_target(folder, force, foreign_in_submodel)


def check_selection(
    selection: str, reference: str, calibration: str | None, recalibrate: bool, scores: Path | None
) -> "SelectionName":
    """The way to select that `--selection` means.

    Raises: UsageError: there is no such way, or it lacks the samples or the scores that it goes by.
    """
    chosen = selection_named(selection, reference, calibration, recalibrate)
    if scores is None and (calibration is None or chosen == "independent"):
        raise UsageError(
            "say what the channels are worth: --scores FILE, which `cahfp score` writes, or to select by samples "
            "--calibration SPEC" + (" without --selection independent." if calibration is not None else ".")
        )
    return chosen


def without_influence(chosen: "SelectionName", calibration: str | None, scored: "Scores | None") -> list[str]:
    """What was asked for and does not count, for people."""
    found = []
    if scored is not None and chosen != "independent":
        name = scored.metadata.criterion
        if calibration is not None:
            found.append(
                f"--scores ({name}) have no influence: --selection {chosen} measures on --calibration itself; choose "
                "--selection independent to keep what the scores rank highest"
            )
        elif name != "gate-ggn":
            found.append(
                f"the criterion of --scores ({name}) has no influence: --selection {chosen} goes by the file's "
                "interactions; choose --selection independent to keep what the criterion ranks highest"
            )
    return found


def selection_named(selection: str, reference: str, calibration: str | None, recalibrate: bool) -> "SelectionName":
    """As `check_selection`, whatever the scores."""
    if reference not in ("network", "labels"):
        raise UsageError(f"--reference {reference}: choose network or labels.")
    for name, needs in {"--recalibrate": recalibrate, "--reference labels": reference == "labels"}.items():
        if needs and calibration is None:
            raise UsageError(f"{name} needs --calibration SPEC, samples to run the network on.")
    match selection:
        case "auto":
            return "linear" if calibration is not None else "independent"
        case "linear" if calibration is None:
            raise UsageError("--selection linear needs --calibration SPEC, samples to run the network on.")
        case "linear" | "quadratic" | "independent":
            return selection
    raise UsageError(f"--selection {selection}: choose auto, linear, quadratic or independent.")


def check_dtypes(
    names: Sequence[str], profiles: Sequence["DeviceProfile"], onnx: bool, calibration: str | None, data: str | None
) -> tuple["Dtype", ...]:
    """The files beside the fp32 one that `--dtype` asks for, in one order whatever the command's.

    Raises: UsageError: there is no such dtype, a device does not take it, or there are no samples to make it on.
    """
    unknown = next((name for name in names if name not in ("fp32", "fp16", "int8")), None)
    if unknown is not None:
        raise UsageError(f"--dtype {unknown}: choose fp32, fp16 or int8.")
    for name in names:
        for profile in profiles:
            if name not in profile.compute.dtypes:
                raise UsageError(
                    f"--dtype {name}: the runtime of {profile.name} takes {' and '.join(profile.compute.dtypes)} only."
                )
    if set(names) - {"fp32"} and not onnx:
        raise UsageError("--dtype makes its files from model.onnx: leave out --no-onnx.")
    if "int8" in names and calibration is None:
        raise UsageError("--dtype int8 needs --calibration SPEC, samples that show the range of every activation.")
    if "fp16" in names and calibration is None and data is None:
        raise UsageError("--dtype fp16 needs --calibration SPEC or --data SPEC, samples to compare it with fp32 on.")
    known: tuple[Dtype, ...] = ("fp16", "int8")
    return tuple(name for name in known if name in names)


def warn_without_vnni(console: Console) -> None:
    """Say what int8 is worth on an x86 CPU without VNNI."""
    from cahfp_cli.running.processor import has_vnni, is_x86

    if is_x86() and not has_vnni():
        console.warn(
            "this CPU has no VNNI that we can see: int8 may be no faster here than fp32. Without --profile the weights "
            "keep to 7 bits, which costs some accuracy; files for a profile keep all 8, and measure too low here."
        )


def quantisations(
    dtypes: Sequence["Dtype"],
    profile: "DeviceProfile | None",
    calibration: "Dataset | None",
    evaluated: "Dataset | None",
    seed: int,
) -> "list[Quantisation]":
    """What to make of one device's ONNX file; compared on `--data`, whose labels count, else on the calibration's."""
    from cahfp_cli.export.int8_layout import layout_for, layout_of_machine
    from cahfp_cli.export.quantised import CALIBRATION_SAMPLES, Quantisation
    from cahfp_cli.significance.measure import subset

    seen, compared = calibration or evaluated, evaluated or calibration
    if not dtypes or seen is None or compared is None:
        return []
    samples = subset(seen, CALIBRATION_SAMPLES, seed).x
    layout = layout_for(profile.runtime.architecture, profile.runtime.provider) if profile else layout_of_machine()
    return [Quantisation(dtype, samples, compared, evaluated is not None, layout) for dtype in dtypes]


def note_file(console: Console, folder: Path, report: Json) -> None:
    """Say what is not to be expected of an ONNX file."""
    file = report.get("onnx", {})
    if "side_file" in file:
        console.note(f"{folder}: the weights of model.onnx are in {file['side_file']}: copy both files together")
    if "left_out" in file:
        console.note(f"{folder}: model.onnx leaves out {', '.join(file['left_out'])}, which no file can hold")


def steps_of(progress: Callable[[int, int], None], number: int, of: int) -> Callable[[int, int], None]:
    """Progress of one of several equal parts, as progress of the whole."""
    return lambda done, total: progress(number * total + done, of * total)


def human(reports: Sequence[dict[str, Any]]) -> str:
    """One line a submodel."""
    from cahfp_cli.commands.networks import percent
    from cahfp_cli.device.quantities import format_bytes, format_count, format_seconds

    rows = []
    for report in reports:
        predicted, full = report["predicted"], report["full"]
        seconds = predicted["latency_seconds"]
        evaluation = report.get("evaluation")
        rows.append(
            [
                report["profile"] or Path(report["folder"]).name,
                f"{report['groups']['kept']}/{report['groups']['of']}",
                f"{format_count(predicted['params'])} ({percent(predicted['params'] / full['params'])})",
                f"{format_count(predicted['macs'])} ({percent(predicted['macs'] / full['macs'])})",
                f"{format_seconds(seconds)}{measured(report)}" if seconds is not None else "-",
                format_bytes(report["onnx"]["bytes"]) if "onnx" in report else "-",
                report["binding"] or "none",
                f"{percent(evaluation['before']['accuracy'])} -> {percent(evaluation['after']['accuracy'])}"
                if evaluation
                else "-",
            ]
        )
    columns = ["device", "groups kept", "params", "MACs", "latency", "ONNX", "binding", "accuracy"]
    return table(columns, rows) + quantised_table(reports)


def measured(report: dict[str, Any]) -> str:
    """The measured latency behind the predicted one, where there is one."""
    from cahfp_cli.device.quantities import format_seconds

    return f" (measured {format_seconds(report['measured']['latency_seconds'])})" if "measured" in report else ""


def quantised_table(reports: Sequence[dict[str, Any]]) -> str:
    """One line a quantised file, after an empty one; nothing where there is none."""
    from cahfp_cli.commands.networks import percent
    from cahfp_cli.device.quantities import format_bytes

    rows = [
        [
            report["profile"] or Path(report["folder"]).name,
            dtype,
            format_bytes(file["bytes"]),
            percent(file["bytes"] / report["onnx"]["bytes"]),
            percent(file["agreement"]),
            f"{file['difference']:.1e}",
            "-" if file["accuracy"] is None else f"{percent(file['fp32_accuracy'])} -> {percent(file['accuracy'])}",
        ]
        for report in reports
        for dtype, file in report.get("quantised", {}).items()
    ]
    columns = ["device", "dtype", "size", "of fp32", "same class", "largest difference", "accuracy"]
    return f"\n\n{table(columns, rows)}" if rows else ""
