"""Networks of other libraries, always with random weights: `torchvision:`, `timm:`, `transformers:`.

A checkpoint may name one of these as its model, so nothing here may fetch weights, reach the network or run code that
a file brings along: arguments that do are refused, and names are looked up in the library's own list.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.factories import nearest

Arguments = Mapping[str, Any]

FETCHING_ARGUMENTS = frozenset(
    {
        "weights", "weights_backbone", "pretrained", "pretrained_backbone", "pretrained_cfg", "pretrained_cfg_overlay",
        "pretrained_strict", "checkpoint_path", "cache_dir", "trust_remote_code", "auto_map", "backbone",
        "use_pretrained_backbone",
    }
)  # fmt: skip


def build_from_library(library: str, name: str, args: Arguments, input_shape: tuple[int, ...], classes: int) -> object:
    """Build `name` of `library` (a key of LIBRARIES) for inputs of `input_shape` and `classes` outputs.

    Raises: UsageError: the library is not installed, has no such model, or an argument would fetch weights.
    """
    spec = f"{library}:{name}"
    fetching = sorted(FETCHING_ARGUMENTS & args.keys())
    if fetching:
        raise UsageError(
            f"{spec!r}: the argument {fetching[0]!r} is not allowed, models start from random weights. "
            "Load trained ones from a checkpoint."
        )
    try:
        return LIBRARIES[library](name, args, input_shape, classes)
    except ModuleNotFoundError as error:
        missing = error.name or library  # timm itself needs torchvision
        raise UsageError(f"{spec!r} needs {missing}, which is not installed: pip install cahfp[vision]") from error


def from_torchvision(name: str, args: Arguments, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A classification network of torchvision; a stem for other than 3 channels replaces the first convolution."""
    import torchvision

    models: Any = torchvision.models
    check_name("torchvision", name, models.list_models(module=models))
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes, **args)
    if input_shape[0] != 3:
        replace_stem(model, input_shape[0])
    return model


def replace_stem(model: nn.Module, channels: int) -> None:
    """Give the first convolution `channels` inputs; torchvision has no argument for it."""
    name, old = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        channels,
        old.out_channels,
        kernel_size=old.kernel_size,  # type: ignore[arg-type]
        stride=old.stride,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def from_timm(name: str, args: Arguments, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A network of timm; `hf-hub:` and `local-dir:` names are not in its list and so are refused."""
    import timm

    check_name("timm", name, timm.list_models())
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=input_shape[0], **args)
    return model


def from_transformers(name: str, args: Arguments, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A network of transformers from a local config.json, with the head that the config names or the first that fits.

    `args` replace entries of the config. Image configs take their channels and square size from `input_shape`.
    """
    import transformers

    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    entries = read_json_object(path)
    if len(input_shape) == 3:
        channels, height, width = input_shape
        shape = {"num_channels": channels, **({"image_size": height} if height == width else {})}
        entries |= {key: value for key, value in shape.items() if key in entries}
    entries |= {**args, "num_labels": classes}
    for key in ("auto_map", "id2label", "label2id"):  # code to fetch; labels that would override num_labels
        entries.pop(key, None)
    kind = entries.pop("model_type", None)
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise InputError(f"{path}: 'model_type' is {kind!r}, which the installed transformers does not know.")
    config = transformers.CONFIG_MAPPING[kind].from_dict(entries)
    if getattr(config, "use_pretrained_backbone", False):
        raise InputError(f"{path}: 'use_pretrained_backbone' would fetch weights; set it to false.")
    model: nn.Module = automodel(config).from_config(config, trust_remote_code=False)
    return model


def automodel(config: Any) -> Any:
    """The Auto class for a config: the head that its `architectures` names, else the first of ours that fits."""
    import transformers

    heads = [
        (transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, transformers.AutoModelForImageClassification),
        (transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, transformers.AutoModelForSequenceClassification),
        (transformers.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING, transformers.AutoModelForAudioClassification),
        (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM),
    ]
    fitting = [(mapping[type(config)], head) for mapping, head in heads if type(config) in mapping]
    named = [head for network, head in fitting if getattr(network, "__name__", "") in (config.architectures or ())]
    return [*named, *(head for _, head in fitting), transformers.AutoModel][0]


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: UsageError: no such file; InputError: not a JSON object."""
    if not path.is_file():
        raise UsageError(f"transformers: no file {str(path)!r}. Give a local folder with config.json, or a JSON file.")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object.")
    return value


def check_name(library: str, name: str, known: list[str]) -> None:
    """Raises: UsageError: the library has no such model."""
    if name not in known:
        raise UsageError(f"{library} has no model {name!r}.{nearest(name, known)}")


LIBRARIES: dict[str, Callable[[str, Arguments, tuple[int, ...], int], nn.Module]] = {
    "torchvision": from_torchvision,
    "timm": from_timm,
    "transformers": from_transformers,
}
