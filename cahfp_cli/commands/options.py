"""What commands share, so that they read and behave the same everywhere: groups of options, values, and options."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cahfp_cli.errors import UsageError

BUDGET, SELECTION, CALIBRATION, TRAINING, SCORING = "Budget", "Selection", "Calibration", "Training", "Scoring"
MERGING, CHECKS, DATA, MODEL = "Merging", "Checks of clients", "Data", "Model"
OUTPUT, RUNTIME, GENERAL = "Output", "Runtime", "Other"
PANELS = (BUDGET, SELECTION, SCORING, CALIBRATION, TRAINING, MERGING, CHECKS, DATA, MODEL, OUTPUT, RUNTIME, GENERAL)
"""The groups of options in help, in their order."""

MOST, MOST_THREADS, MOST_SEED = 2**31 - 1, 1024, 2**63 - 1
"""Bounds of whole numbers: what libraries count in 32 bits, threads that a process can start, seeds of torch."""

CRITERIA = (
    *("gate-ggn", "gate-loss", "gate-fisher", "gate-magnitude", "gate-taylor", "gate-taylor-signed"),
    *("weight-fisher", "obd", "bn-scale", "lamp", "l1", "l2", "random"),
)
RULES = ("fill", "covered", "curvature", "trimmed-mean", "median")
DEVICES = ("auto", "cpu", "cuda", "mps")
MODELS = ("vgg11", "vgg13", "vgg16", "resnet18", "resnet20", "resnet32", "resnet56")
LIBRARIES = ("torchvision:", "timm:", "transformers:")
DATA_SETS = ("digits@train", "digits@test", "fashion-mnist@train", "fashion-mnist@test", "idx:", "npz:", "folder:")
"""Names that completion offers; they stand here since the packages that know them import torch. A test compares."""


def finite(value: float) -> float:
    """What is computed with, so neither infinite nor no number. Raises: typer.BadParameter: it is."""
    if not math.isfinite(value):
        raise typer.BadParameter("give a finite number.")
    return value


def number_or_percentage(text: str | float) -> float:
    """`0.1` or `10%` as 0.1. Raises: typer.BadParameter: neither."""
    text = str(text).strip()
    try:
        return float(f"{text[:-1].rstrip()}e-2" if text.endswith("%") else text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor a percentage such as 10%.") from None


def one_of(flag: str, names: Sequence[str]) -> Callable[[str | None], str | None]:
    """A check of an option's value. The check raises UsageError: it is none of `names`."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            listed = " or ".join(names) if len(names) == 2 else f"one of {', '.join(names)}"
            raise UsageError(f"{flag} {value!r}: choose {listed}.")
        return value

    return check


def offer(*names: str) -> Callable[[], list[str]]:
    """What the shell's completion offers; it leaves out by itself what does not begin like the word typed so far."""
    return lambda: list(names)


def choice(flag: str, names: Sequence[str], panel: str, help: str) -> Any:
    """An option that takes one of a few names, and nothing else."""
    return typer.Option(
        flag,
        metavar="|".join(names),
        callback=one_of(flag, names),
        autocompletion=offer(*names),
        rich_help_panel=panel,
        help=help,
    )


def profiles(incomplete: str) -> list[str]:
    """For completion: the profiles that come with cahfp, and .toml files."""
    from cahfp_cli.device.catalogue import profile_names

    folder, slash, start = incomplete.rpartition("/")
    files = sorted(path.name for path in Path(folder + slash or ".").glob("*.toml") if path.name.startswith(start))
    return [*profile_names(), *(f"{folder}{slash}{name}" for name in files)]


Json = Annotated[
    bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print the result as one JSON object on standard output.")
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", rich_help_panel=OUTPUT, help="Print the result and warnings only, no progress and no hints."
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        rich_help_panel=OUTPUT,
        help="Replace the output if it exists; a folder only if cahfp wrote everything in it.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", rich_help_panel=OUTPUT, help="Check and compute everything, but write nothing.")
]
Opset = Annotated[
    int,
    typer.Option(
        "--opset",
        metavar="N",
        min=13,
        max=20,
        rich_help_panel=OUTPUT,
        help="ONNX opset of model.onnx, 13 to 20. Older runtimes need a lower one, which not every network allows.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        max=MOST_SEED,
        rich_help_panel=RUNTIME,
        help="Seed of all random draws: the same inputs and seed give the same bytes.",
    ),
]
Device = Annotated[
    str, choice("--device", DEVICES, RUNTIME, "Where to compute; auto takes the first of cuda, mps, cpu that is there.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        max=MOST_THREADS,
        rich_help_panel=RUNTIME,
        help="CPU threads; without it, PyTorch's own choice.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size",
        metavar="N",
        min=1,
        max=MOST,
        rich_help_panel=RUNTIME,
        help="Samples that are run together; fewer need less memory.",
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        metavar="FOLDER",
        rich_help_panel=DATA,
        help="Folder with the files of a data set that is given by name (fashion-mnist).",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        autocompletion=offer(*DATA_SETS),
        rich_help_panel=DATA,
        help="digits, fashion-mnist, idx:FOLDER, npz:FILE, folder:FOLDER (a folder of images for each class), or a "
        "function as package.module:function or file.py:function. @train or @test may follow, then a slice such as "
        "[0:500].",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        autocompletion=offer(*MODELS, *LIBRARIES),
        rich_help_panel=MODEL,
        help=f"Architecture: {', '.join(MODELS)}, torchvision:NAME, timm:NAME, transformers:FOLDER_OR_CONFIG, or a "
        "function of yours as package.module:function or file.py:function. Checkpoints of cahfp record it.",
    ),
]
ModelArg = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg", metavar="NAME=VALUE", rich_help_panel=MODEL, help="Argument of the model, such as width=0.5."
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        "--input-shape",
        metavar="SHAPE",
        rich_help_panel=MODEL,
        help="Shape of one sample, without the batch, such as 3x32x32. Checkpoints of cahfp record it.",
    ),
]
INPUT_DTYPES = ("float32", "int64")
InputDtype = Annotated[
    str | None,
    choice(
        "--input-dtype",
        INPUT_DTYPES,
        MODEL,
        "Type of the samples, int64 for tokens. Without it, what the checkpoint records, else that of the data, else "
        "float32.",
    ),
]
Classes = Annotated[
    int | None,
    typer.Option(
        "--classes",
        metavar="N",
        min=1,
        max=MOST,
        rich_help_panel=MODEL,
        help="Number of classes, which is that of outputs. Checkpoints of cahfp record it.",
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="NAME",
        rich_help_panel=MODEL,
        help="Which network of a checkpoint that holds several: its entry (state_dict, ema, ...), or what the names of "
        "its tensors begin with.",
    ),
]
