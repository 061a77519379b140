"""Model specs to networks: ours by name, other libraries', or a factory of the user's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from cahfp_cli.checkpoint.metadata import ModelSpec, Scalar
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.factories import call, nearest, run_factory, user_code
from cahfp_cli.models import resnet, vgg
from cahfp_cli.models.lazy import complete_lazy_layers
from cahfp_cli.models.libraries import LIBRARIES, build_from_library
from cahfp_cli.models.random_streams import random_streams

BUILT_IN = {
    "vgg11": vgg.vgg11,
    "vgg13": vgg.vgg13,
    "vgg16": vgg.vgg16,
    "resnet18": resnet.resnet18,
    "resnet20": resnet.resnet20,
    "resnet32": resnet.resnet32,
    "resnet56": resnet.resnet56,
}
OWN_OPTIONS = {"input_shape": "--input-shape", "classes": "--classes"}


def is_code(spec: str) -> bool:
    """Whether building this spec runs code that the spec names: anything with a colon that is not a known library."""
    library, colon, _ = spec.partition(":")
    return bool(colon) and library not in LIBRARIES


def resolve_spec(given: str | None, args: Mapping[str, Scalar], recorded: ModelSpec | None, path: Path) -> ModelSpec:
    """The model to build for a checkpoint: what the user gave, else what the file records if that runs no code.

    Of the recorded model, or another of the same name where code has moved, the recorded arguments hold unless `args`
    gives others.
    Raises: UsageError: neither is there, or the file names code to run (a file must never choose that).
    """
    if given is not None:
        same = recorded is not None and same_model(given, recorded.spec)
        return ModelSpec(spec=given, args={**(recorded.args if recorded is not None and same else {}), **args})
    if args:
        raise UsageError("--model-arg needs --model: the arguments of a recorded model are recorded with it.")
    if recorded is None:
        raise UsageError(f"{path} records no model: pass --model SPEC and --input-shape CxHxW.")
    if recorded.spec.startswith("<"):
        raise UsageError(
            f"{path} was made from a live module, {recorded.spec[1:-1]}: name the factory that builds it by --model "
            "FILE.py:FACTORY, or give the module itself to the library's load_submodel or load."
        )
    if is_code(recorded.spec):
        raise UsageError(
            f"{path} asks to run the code {recorded.spec!r}, which a file may not decide.\n"
            f"If you trust that code, pass --model {recorded.spec!r} yourself"
            + (f", with {model_arg_options(recorded.args)}." if recorded.args else ".")
        )
    return recorded


def live(module: type) -> ModelSpec:
    """What is recorded of a module that nobody has said how to build: its class, in brackets, which no spec has."""
    return ModelSpec(spec=f"<{module.__qualname__}>")


def same_model(given: str, recorded: str) -> bool:
    """Whether two specs name the same model; of code, whose files and packages move, the same factory."""
    if is_code(given) and is_code(recorded):
        return given.rpartition(":")[2] == recorded.rpartition(":")[2]
    return given == recorded


def model_arg_options(args: Mapping[str, Scalar]) -> str:
    """The options that would give these arguments."""
    return " ".join(f"--model-arg {f'{key}={json.dumps(value)}'!r}" for key, value in args.items())


def build(spec: ModelSpec, input_shape: tuple[int, ...], classes: int | None, seed: int = 0) -> nn.Module:
    """Build the network that `spec` names, on the CPU, with random weights drawn from `seed`.

    The global random state is left as it was. Running a spec for which `is_code` holds runs that code.

    Args:
        input_shape: one sample's shape, for images (channels, height, width).
        classes: number of outputs; None only for a factory that does not need it.
    Raises: UsageError: no such model, a missing library, or arguments that do not match; InputError: the factory
        raises, or gives no nn.Module, or one with lazy layers that does not run on such a sample.
    """
    with random_streams(seed):
        return construct(spec, input_shape, classes)


def construct(spec: ModelSpec, input_shape: tuple[int, ...], classes: int | None) -> nn.Module:
    """As `build`, with the random streams as they are."""
    for name, option in OWN_OPTIONS.items():
        if name in spec.args:
            raise UsageError(f"--model-arg {name}=...: use {option} instead.")
    model = make(spec, tuple(input_shape), classes)
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec.spec!r} returned a {type(model).__name__}, not a torch.nn.Module.")
    complete_lazy_layers(model, tuple(input_shape))
    return model


def make(spec: ModelSpec, input_shape: tuple[int, ...], classes: int | None) -> object:
    """Whatever the spec's factory returns."""
    offered = {"input_shape": input_shape} | ({} if classes is None else {"classes": classes})
    library, colon, rest = spec.spec.partition(":")
    if not colon:
        if spec.spec not in BUILT_IN:
            raise unknown_model(spec.spec)
        with user_code(spec.spec):
            return call(spec.spec, BUILT_IN[spec.spec], spec.args, offered)
    if library in LIBRARIES:
        if classes is None:
            raise UsageError(f"{spec.spec!r} needs the number of classes: pass --classes N.")
        with user_code(spec.spec):
            return build_from_library(library, rest, spec.args, input_shape, classes)
    return run_factory(spec.spec, spec.args, offered)


def unknown_model(spec: str) -> UsageError:
    """The error for a bare name that is none of ours."""
    return UsageError(
        f"no model {spec!r}.{nearest(spec, list(BUILT_IN))} There are {', '.join(BUILT_IN)}; torchvision:NAME, "
        "timm:NAME, transformers:DIR_OR_CONFIG, package.module:factory and path/to/file.py:factory."
    )


def parse_model_args(pairs: Sequence[str]) -> dict[str, Scalar]:
    """`k=v` options to keyword arguments; a value is a JSON scalar (0.5, true, null, "text") or else plain text.

    Raises: UsageError: no '=', a name that is no Python identifier, or one given twice.
    """
    args: dict[str, Scalar] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--model-arg {pair!r}: write name=value, such as width=0.5.")
        if key in args:
            raise UsageError(f"--model-arg {key!r} is given twice.")
        args[key] = scalar(text)
    return args


def scalar(text: str) -> Scalar:
    """A JSON scalar, or the text itself when it is none (NaN and Infinity are not JSON)."""

    def not_json(constant: str) -> Any:
        raise ValueError(constant)

    try:
        value = json.loads(text, parse_constant=not_json)
    except (ValueError, RecursionError):
        return text
    return value if value is None or isinstance(value, bool | int | float | str) else text
