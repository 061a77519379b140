"""`cahfp inspect`: what any file of ours says of itself.

Only `--groups` and an experiment's TOML import torch, only `--plot` matplotlib.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cahfp_cli.commands import options
from cahfp_cli.errors import InputError, UsageError, first_line
from cahfp_cli.output import Console, Json, table

if TYPE_CHECKING:
    from cahfp_cli.checkpoint.safetensors_file import SafetensorsFile
    from cahfp_cli.checkpoint.sharded import ShardedCheckpoint

CHECKPOINT, SUBMODEL, INDEX_MAP, CURVATURE, SCORES = (
    "cahfp.checkpoint/1",
    "cahfp.submodel/1",
    "cahfp.index_map/1",
    "cahfp.curvature/1",
    "cahfp.scores/1",
)
PARTIAL, RECONSTRUCTION = "cahfp.partial/1", "cahfp.reconstruction/1"
EXPERIMENT, STATE, SUMMARY = "experiment.json", "state.json", "summary.json"
MEMORY = frozenset({"scores", "scored", "masks"})
"""What `cahfp simulate` writes, see `federation`, which would import torch: names of files, and tensors of a memory."""
FIGURES = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<svg", ".pdf": b"%PDF-"}
PAGE = re.compile(r'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>([^<]*)</title>')
MOST_BYTES = 2**28


def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="ANY_FILE_OF_OURS",
            help="Anything that a command wrote: checkpoint, scores, submodel folder, report, profile, simulation, ...",
        ),
    ],
    groups: Annotated[
        bool,
        typer.Option(
            "--groups",
            rich_help_panel=options.MODEL,
            help="For a checkpoint or submodel: show its channel groups (channels that can only be removed together), "
            "and which tensors cannot be pruned and why.",
        ),
    ] = False,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    input_shape: options.InputShape = None,
    input_dtype: options.InputDtype = None,
    classes: options.Classes = None,
    key: options.Key = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            rich_help_panel=options.OUTPUT,
            help="For scores: draw the significance of each layer into this file (.png, .svg or .pdf).",
        ),
    ] = None,
    submodel: Annotated[
        Path | None,
        typer.Option(
            "--submodel",
            metavar="FOLDER",
            rich_help_panel=options.OUTPUT,
            help="With --plot: show which of the channels this submodel folder keeps.",
        ),
    ] = None,
    json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Show what a file holds and how it came to be."""
    network = {"--model": model, "--model-arg": model_arg, "--input-shape": input_shape, "--input-dtype": input_dtype}
    check_needed_by("--groups", groups, {**network, "--classes": classes, "--key": key})
    check_needed_by("--plot", plot is not None, {"--submodel": submodel, "--force": force})
    if groups and plot is not None:
        raise UsageError("--plot draws scores: it does not go with --groups.")
    if groups:
        result = describe_groups(file, model, model_arg, input_shape, input_dtype, classes, key)
        Console(json).result(human_groups(result), result)
        return
    result = describe(file) if plot is None else draw(file, plot, submodel, force)
    Console(json).result(human(result), result)


def check_needed_by(flag: str, is_given: bool, others: Mapping[str, object]) -> None:
    """Raises: UsageError: one of the flags `others` has a value, but `flag`, which alone uses it, is not given."""
    for other, value in others.items():
        if value and not is_given:
            raise UsageError(f"{other} goes with {flag}.")


def draw(file: Path, plot: Path, submodel: Path | None, force: bool) -> Json:
    """Draw scores into the file `plot`; returns their description.

    Raises: UsageError: `file` holds no scores, `plot` names no kind of figure, or matplotlib is not installed.
    """
    from cahfp_cli.checkpoint.atomic import check_file_target
    from cahfp_cli.significance.scores import read_scores

    try:
        from cahfp_cli.plots.figure_file import figure_suffix, save_figure
        from cahfp_cli.plots.scores import draw_scores, kept_mask
    except ModuleNotFoundError as error:
        raise UsageError(f"--plot needs {error.name}, which is not installed: pip install 'cahfp[plots]'") from error

    figure_suffix(plot)
    check_file_target(plot, force)
    result = describe(file)
    if result["kind"] != "scores":
        raise UsageError(f"--plot draws scores, but {file} is of the kind: {result['kind']}.")
    scores = read_scores(file)
    kept = kept_mask(scores, submodel) if submodel is not None else None
    save_figure(draw_scores(scores, kept), plot, force)
    return {**result, "plot": str(plot)}


def describe_groups(
    file: Path,
    model: str | None,
    model_arg: list[str] | None,
    input_shape: str | None,
    input_dtype: str | None,
    classes: int | None,
    key: str | None,
) -> Json:
    """The channel groups of a network."""
    from dataclasses import asdict

    from cahfp_cli.commands.networks import open_network
    from cahfp_cli.coupling.analysis import analyse
    from cahfp_cli.coupling.coverage import coverage
    from cahfp_cli.models.inputs import torch_type

    network = open_network(file, model, model_arg, input_shape, input_dtype, classes, key=key, warn=Console().warn)
    analysis = analyse(network.model, network.input_shape, torch_type(network.input_dtype))
    found = coverage(network.model, analysis)
    return {
        "kind": "channel groups",
        "file": str(file),
        "prunable_share": found.prunable_share,
        "groups": sum(family.groups for family in found.families),
        "families": [{**asdict(family), "tensors": list(family.tensors)} for family in found.families],
        "pinned": [{"tensor": name, "elements": size, "reason": reason} for name, size, reason in found.pinned],
        "remarks": list(analysis.behaviour.remarks),
        "rewritten": list(found.rewritten),
        "traced": "shapes only" if found.on_meta else "with real tensors: the code reads values",
    }


def human_groups(result: Json) -> str:
    """The same for people: long lists of coupled tensors cut short."""
    families = [
        {
            "family": family["name"],
            "groups": family["groups"],
            "at least": family["narrowest"],
            "elements": family["elements"],
            "coupled axes": shortened(family["tensors"]),
            "if zeroed instead": family["not_mask_equivalent"] or "the same",
        }
        for family in result["families"]
    ]
    pinned = {"pinned": result["pinned"]} if result["pinned"] else {}
    rewritten = {"rewritten in a submodel": result["rewritten"]} if result["rewritten"] else {}
    head = {key: result[key] for key in ("kind", "file", "traced", "groups")}
    share = {"prunable share of the parameters": f"{result['prunable_share']:.2%}"}
    remarks = {"remarks": result["remarks"]} if result["remarks"] else {}
    return human({**head, **share, "families": families, **pinned, **rewritten, **remarks})


def shortened(names: list[str], most: int = 3) -> str:
    """The first of many names."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def describe(path: Path) -> Json:
    """Everything worth knowing about a file or folder. Raises: InputError: it is none of ours, or damaged."""
    from cahfp_cli.checkpoint.sharded import SUFFIX
    from cahfp_cli.formats.files import ONNX_WEIGHTS

    if path.is_dir():
        return describe_folder(path)
    if not path.exists():
        raise InputError(f"{path}: no such file.")
    if path.name.endswith(SUFFIX):
        return describe_shards(path)
    head: Json = {"file": str(path), "bytes": path.stat().st_size}
    if path.name == ONNX_WEIGHTS:
        return {**head, **describe_weights(path)}
    match path.suffix.lower():
        case ".onnx":
            return describe_onnx(path)
        case ".toml":
            return {**describe_toml(path), "file": str(path)}
        case ".json":
            return {**describe_json(path), "file": str(path)}
        case ".jsonl":
            return {**head, **describe_figures(path)}
        case ".html":
            return {**head, **describe_page(path)}
        case suffix if suffix in FIGURES:
            return {**head, **describe_figure(path)}
        case _:
            from cahfp_cli.checkpoint.safetensors_file import open_safetensors

            with open_safetensors(path) as file:
                return {**head, **describe_tensors(file), **part_of(path)}


def describe_folder(path: Path) -> Json:
    """A submodel folder, several of them as `cahfp prune` writes them, a checkpoint in shards, a simulation, a run."""
    from cahfp_cli.checkpoint.sharded import SUFFIX, is_sharded
    from cahfp_cli.formats.files import FILES, TENSORS

    if (path / TENSORS).is_file():
        parts = {name: describe(path / name) for name in FILES if (path / name).is_file()}
        return {"kind": "submodel folder", "file": str(path), "files": parts}
    indices = [path] if is_sharded(path) else [child for child in path.iterdir() if child.name.endswith(SUFFIX)]
    if len(indices) == 1:
        return {**describe_shards(indices[0]), "file": str(path)}
    if (path / EXPERIMENT).is_file():
        return describe_simulation(path)
    if (path / STATE).is_file():
        return {**describe_json(path / STATE), "file": str(path)}
    submodels = sorted(child for child in path.iterdir() if (child / TENSORS).is_file())
    if not submodels:
        raise InputError(
            f"{path}: not a submodel folder, nor another that cahfp writes: it holds no {TENSORS}, no index of shards, "
            f"no {EXPERIMENT} and no {STATE}."
        )
    return {"kind": "submodels", "file": str(path), "submodels": {s.name: describe_folder(s) for s in submodels}}


def part_of(path: Path) -> Json:
    """The kind of a file that is a shard, and the index that names it; nothing of another."""
    from cahfp_cli.checkpoint.sharded import SUFFIX, files_of, open_checkpoint

    for index in sorted(path.parent.glob(f"*{SUFFIX}")):
        try:
            with open_checkpoint(index) as checkpoint:
                if path in files_of(checkpoint):
                    return {"kind": "shard", "of": index.name}
        except InputError:
            continue
    return {}


def describe_shards(path: Path) -> Json:
    """A checkpoint in several files, of which the first says what it is."""
    from cahfp_cli.checkpoint.sharded import files_of, open_checkpoint

    with open_checkpoint(path) as checkpoint:
        files = files_of(checkpoint)
        size = sum(file.stat().st_size for file in files)
        return {"file": str(path), "bytes": size, "shards": len(files) - 1, **describe_tensors(checkpoint)}


def describe_simulation(path: Path) -> Json:
    """What `cahfp simulate` has done so far: rounds of each run that are committed."""
    runs = []
    for state in sorted(path.glob(f"runs/*/*/seed*/{STATE}")):
        partition, method, seed = state.parent.relative_to(path / "runs").parts
        done = describe_json(state)
        runs.append({"partition": partition, "method": method, "seed": seed, "rounds": done.get("rounds")})
    experiment = describe_json(path / EXPERIMENT)
    return {**experiment, "kind": "simulation", "file": str(path), "finished": (path / SUMMARY).is_file(), "runs": runs}


def describe_toml(path: Path) -> Json:
    """A device profile or an experiment, told apart by a key that every experiment has and no profile."""
    import tomllib

    from cahfp_cli.device.profile import read_profile

    try:
        is_experiment = "methods" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        is_experiment = False  # the profile's reader says what is wrong
    if is_experiment:
        from cahfp_cli.federation.experiment import read_experiment

        return {"kind": "experiment", **read_experiment(path).model_dump(mode="json", exclude_none=True)}
    return {"kind": "device profile", **read_profile(path).model_dump(mode="json", exclude_none=True)}


def describe_json(path: Path) -> Json:
    """A report, or what a simulation keeps: by its format, or by the keys that it must have."""
    from cahfp_cli.checkpoint import strict_json
    from cahfp_cli.formats.report import read_report

    content = strict_json.read(
        path, MOST_BYTES, too_large="it is larger than anything that cahfp writes.", damaged="Make the file again."
    )
    if isinstance(content, list) and content and all(is_round(row) for row in content):
        return {"kind": "state of a run", "rounds": len(content), "last": told(content[-1])}
    keys = content.keys() if isinstance(content, dict) else set()
    if keys == {"experiment", "results"} and isinstance(content["results"], list):
        results = [told(row) for row in content["results"] if isinstance(row, dict)]
        return {"kind": "summary of a simulation", "results": results}
    if {"methods", "partitions", "fleet"} <= keys:
        return {**content, "kind": "experiment"}
    if keys and content.get("format") == RECONSTRUCTION:
        return {**content, "kind": "report of a reconstruction"}
    return {**read_report(path), "kind": "report"}


def is_round(row: object) -> bool:
    """Whether a record is that of a round."""
    return isinstance(row, dict) and type(row.get("round")) is int


def told(row: Json) -> Json:
    """The figures of a record, without its lists and tables."""
    return {key: value for key, value in row.items() if isinstance(value, str | int | float | None)}


def describe_figures(path: Path) -> Json:
    """The rounds of all runs, a line each."""
    from cahfp_cli.checkpoint import strict_json

    runs: dict[tuple[str, ...], int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = strict_json.parse(line)
            except ValueError as error:
                raise InputError(f"{path}: line {number} is damaged: {error}.") from None
            if not is_round(row):
                raise InputError(f"{path}: line {number} is no round of a simulation, so cahfp did not write this.")
            run = tuple(str(row.get(key)) for key in ("partition", "method", "seed"))
            runs[run] = runs.get(run, 0) + 1
    if not runs:
        raise InputError(f"{path}: it is empty, so cahfp did not write it.")
    columns = ("partition", "method", "seed", "rounds")
    rows = [dict(zip(columns, (*run, rounds), strict=True)) for run, rounds in runs.items()]
    return {"kind": "figures of a simulation", "runs": rows}


def describe_page(path: Path) -> Json:
    """A page of `simulate` or of `reconstruct --html`."""
    from html import unescape

    with path.open("rb") as file:
        begin = file.read(4096).decode("utf-8", errors="replace")
    title = PAGE.match(begin)
    if title is None:
        raise InputError(f"{path}: not a page that cahfp wrote.")
    return {"kind": "page", "title": unescape(title[1])}


def describe_figure(path: Path) -> Json:
    """A figure. Raises: InputError: its content is not what its name says."""
    with path.open("rb") as file:
        begin = file.read(1024)
    if FIGURES[path.suffix.lower()] not in begin:
        raise InputError(f"{path}: not a figure of the kind that its name says.")
    return {"kind": "figure"}


def describe_weights(path: Path) -> Json:
    """The numbers of an ONNX file that is too large to hold them. Raises: InputError: there is no such file beside."""
    from cahfp_cli.formats.files import ONNX
    from cahfp_cli.pruning.ownership import belongs

    if not belongs(path):
        raise InputError(f"{path}: the {ONNX} beside it does not name it, so nobody says whose numbers these are.")
    return {"kind": "ONNX weights", "of": ONNX}


def describe_tensors(file: "SafetensorsFile | ShardedCheckpoint") -> Json:
    """A safetensors file, or several of one checkpoint: by the format it names, or as someone else's checkpoint."""
    from cahfp_cli.checkpoint.digest import content_digest
    from cahfp_cli.checkpoint.metadata import (
        KEY,
        CheckpointMetadata,
        CurvatureMetadata,
        SubmodelMetadata,
        read_metadata,
    )
    from cahfp_cli.checkpoint.ownership import format_of
    from cahfp_cli.formats.index_map_file import read_index_map
    from cahfp_cli.significance.scores import ScoresMetadata, read_scores

    elements = sum(element_count(info.shape) for info in file.tensors.values())
    tensors: Json = {"tensors": len(file.tensors), "elements": elements, "digest": content_digest(file)}
    if KEY not in file.metadata:
        if file.tensors.keys() == MEMORY and len(file.tensors["masks"].shape) == 2:
            clients, groups = file.tensors["masks"].shape
            return {"kind": "memory of a run", **tensors, "clients": clients, "groups": groups}
        return {"kind": "checkpoint (not written by cahfp)", **tensors}
    name = format_of(file.metadata)
    if name == PARTIAL:
        from cahfp_cli.reconstruction.partial import PartialMetadata

        return {"kind": "partial aggregate", **tensors, **read_metadata(file, PartialMetadata).model_dump(mode="json")}
    if name == SUBMODEL:
        return {"kind": "submodel", **tensors, **read_metadata(file, SubmodelMetadata).model_dump(mode="json")}
    if name == CURVATURE:
        return {"kind": "curvature", **tensors, **read_metadata(file, CurvatureMetadata).model_dump(mode="json")}
    if name == INDEX_MAP:
        index_map = read_index_map(file.path)
        whole = sum(element_count(t.shape) for t in index_map.tensors.values())
        kept = sum(element_count(t.submodel_shape) for t in index_map.tensors.values())
        return {
            "kind": "index map",
            "format": INDEX_MAP,
            "checkpoint": index_map.checkpoint,
            "tensors": len(index_map.tensors),
            "rewrites": len(index_map.rewrites),
            "elements": {"kept": kept, "of": whole},
        }
    if name == SCORES:
        scores = read_scores(file.path)
        about = read_metadata(file, ScoresMetadata).model_dump(mode="json")
        families = about.pop("families")
        return {
            "kind": "scores",
            **about,
            "groups": len(scores.significance),
            "families": [
                {"family": family, "groups": int(own.size), "min": float(own.min()), "max": float(own.max())}
                for number, family in enumerate(families)
                if (own := scores.significance[scores.family == number]).size
            ],
        }
    return {"kind": "checkpoint", **tensors, **read_metadata(file, CheckpointMetadata).model_dump(mode="json")}


def describe_onnx(path: Path) -> Json:
    """An ONNX file: inputs, outputs, opset, operators, metadata."""
    import onnx
    from google.protobuf.message import DecodeError

    from cahfp_cli.export.side_file import size_of_file

    try:
        model = onnx.load(str(path), load_external_data=False)
        onnx.checker.check_model(model)
        return {"kind": "ONNX", "file": str(path), "bytes": size_of_file(path), **described(model)}
    except (DecodeError, UnicodeDecodeError, onnx.checker.ValidationError) as error:  # text is decoded where it is read
        raise InputError(f"{path}: not a valid ONNX file: {first_line(error)}") from None


def described(model: Any) -> Json:
    """What an ONNX model says of itself."""
    operators: dict[str, int] = {}
    for node in model.graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1

    def shape(value: Any) -> list[int | str]:
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    return {
        "inputs": {value.name: shape(value) for value in model.graph.input},
        "outputs": {value.name: shape(value) for value in model.graph.output},
        "opset": max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0),
        "operators": dict(sorted(operators.items())),
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
    }


def element_count(shape: tuple[int, ...]) -> int:
    from math import prod

    return prod(shape)


def human(result: Json, indent: str = "") -> str:
    """The same as text: nested keys indented, lists of records as tables."""
    lines = []
    for key, value in result.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}:", human(value, indent + "  ")]
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            columns = list(value[0])
            rows = [[shown(item.get(column)) for column in columns] for item in value]
            lines += [f"{indent}{key}:", *(f"{indent}  {line}" for line in table(columns, rows).splitlines())]
        else:
            lines.append(f"{indent}{key}: {shown(value)}")
    return "\n".join(lines)


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return (
            "x".join(map(str, value))
            if value and all(isinstance(v, int) for v in value)
            else ", ".join(map(str, value))
        )
    return "-" if value is None or value == {} else str(value)
