"""The tensor of logits, and all tensors, in whatever a network returns."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

import torch
from torch import nn

from cahfp_cli.errors import InputError


def logits_of(output: object) -> torch.Tensor:
    """Logits (n, ..., classes) of a network's output.

    A tensor is taken as it is; otherwise an attribute or key `logits` (transformers, torchvision's Inception); of a
    headless transformer the mean of `last_hidden_state` (n, tokens, features) over its tokens; of a plain tuple or
    list its first element.
    Raises: InputError: none of these.
    """
    if isinstance(output, torch.Tensor):
        return output
    logits = field(output, "logits")
    if isinstance(logits, torch.Tensor):
        return logits
    hidden = field(output, "last_hidden_state")
    if isinstance(hidden, torch.Tensor) and hidden.ndim >= 3:
        return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.flatten(2).mean(dim=2)
    if isinstance(output, tuple | list) and output and output[0] is not output:
        return logits_of(output[0])
    named = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    raise InputError(
        f"the model returned a {type(output).__name__}{named}: it must return a tensor of logits, alone, first in a "
        "tuple, or as `logits`."
    )


def all_tensors_of(output: object) -> list[torch.Tensor]:
    """The tensors in a network's output, in its order, see `leaves`; of other objects what `logits_of` would take."""
    found: list[torch.Tensor] = []
    for _, leaf in leaves(output):
        fields = [leaf, *(field(leaf, name) for name in ("logits", "last_hidden_state"))]
        found += [value for value in fields if isinstance(value, torch.Tensor)]
    return found


def leaves(
    output: object, path: tuple[str, ...] = (), within: tuple[object, ...] = ()
) -> Iterator[tuple[tuple[str, ...], object]]:
    """Whatever is in an output that holds nothing itself, with the keys that lead to it. Tuples, lists, mappings and
    objects with tensors as attributes hold something; a transformer's cache, which only a next call could use, does
    not. Args: within: what holds the output, which may hold itself."""
    parts = None if any(output is holder for holder in within) else parts_of(output)
    if parts is None:
        yield path, output
        return
    for key, part in parts:
        yield from leaves(part, (*path, key), (*within, output))


def parts_of(output: object) -> list[tuple[str, object]] | None:
    """What a container holds, by key; None for anything else."""
    if isinstance(output, Mapping):
        return [(str(key), part) for key, part in output.items()]
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return list(zip(output._fields, output, strict=True))
    if isinstance(output, tuple | list | deque):
        return [(str(number), part) for number, part in enumerate(output)]
    if is_dataclass(output) and not isinstance(output, type):
        return [(one.name, getattr(output, one.name, None)) for one in fields(output)]
    attributes = {} if isinstance(output, torch.Tensor | nn.Module) else getattr(output, "__dict__", {})
    holds_tensors = any(isinstance(part, torch.Tensor) for part in attributes.values())
    return list(attributes.items()) if holds_tensors else None


def field(output: object, name: str) -> object:
    """An entry of an output that is a mapping or has attributes, else None."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
