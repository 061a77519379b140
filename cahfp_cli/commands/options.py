"""What commands share, so that they read and behave the same everywhere: options, and the class that shows help."""

import inspect
import math
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import ArgumentInfo

MOST, MOST_THREADS, MOST_SEED = 2**31 - 1, 1024, 2**63 - 1
"""Bounds of whole numbers: what libraries count in 32 bits, threads that a process can start, seeds of torch."""


def finite(value: float) -> float:
    """What is computed with, so neither infinite nor no number. Raises: typer.BadParameter: it is."""
    if not math.isfinite(value):
        raise typer.BadParameter("give a finite number.")
    return value


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no hints, only the result.")]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=MOST_SEED, help="Same inputs and same seed give the same bytes.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Overwrite the output if it exists; a folder only if all in it is ours.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")]
Device = Annotated[str, typer.Option("--device", help="Compute on auto, cpu, cuda or mps.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, max=MOST_THREADS, help="CPU threads to use.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, max=MOST, help="Samples at a time.")]
DataRoot = Annotated[Path | None, typer.Option("--data-root", help="Folder that holds the files of a named data set.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="digits | fashion-mnist | idx:DIR | npz:FILE | folder:DIR | package.module:factory | file.py:factory, "
        "with @train or @test and optionally [first:last].",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="vgg11, vgg13, vgg16, resnet18, resnet20, resnet32, resnet56 | torchvision:NAME | timm:NAME | "
        "transformers:DIR_OR_CONFIG | package.module:factory | path/to/file.py:factory.",
    ),
]
ModelArg = Annotated[
    list[str] | None, typer.Option("--model-arg", help="Keyword argument of the model, k=v; may be repeated.")
]
InputShape = Annotated[
    str | None, typer.Option("--input-shape", help="Shape of one sample, e.g. 3x32x32; recorded in our checkpoints.")
]
InputDtype = Annotated[
    str | None,
    typer.Option(
        "--input-dtype",
        help="float32, or int64 for tokens; recorded in our checkpoints, else that of the data, else float32.",
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        help="Of a checkpoint with several networks in it: the entry to take (state_dict, ema, ...), or what the names "
        "of its tensors start with.",
    ),
]
Classes = Annotated[
    int | None, typer.Option("--classes", min=1, max=MOST, help="Number of outputs; recorded in our checkpoints.")
]
Opset = Annotated[
    int,
    typer.Option("--opset", min=13, max=20, help="ONNX opset of model.onnx: lower for older runtimes, if it allows."),
]


class Command(TyperCommand):
    """A command that shows the help of its arguments, once, and no escapes that are meant for rich.

    Flower asks for typer below 0.21. Under it, plain help shows "\\[required]" where rich is installed; and click from
    8.5 on forgets the help of arguments, or lists them twice.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        helps = argument_helps(self.callback)
        for parameter in self.params:
            if not getattr(parameter, "help", None) and parameter.name in helps:
                parameter.help = helps[parameter.name]  # type: ignore[attr-defined]

    def format_arguments(self, ctx: Any, formatter: Any) -> None:
        """Click's own list of arguments: nothing, since typer lists them with the options."""

    def get_help(self, ctx: Any) -> str:
        return super().get_help(ctx).replace("\\[", "[")


def argument_helps(callback: Any) -> dict[str, str]:
    """The help of each argument of a command's function, by its name."""
    hints = get_type_hints(inspect.unwrap(callback), include_extras=True)
    return {
        name: one.help
        for name, hint in hints.items()
        for one in getattr(hint, "__metadata__", ())
        if isinstance(one, ArgumentInfo) and one.help
    }
