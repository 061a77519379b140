"""Every tensor in what a network returns, by a name that stays the same from call to call."""

import re
from collections.abc import Mapping

import torch
from torch import nn

from cahfp_cli.errors import InputError
from cahfp_cli.models.outputs import leaves, logits_of

LOGITS = "logits"


class NamedOutputs(nn.Module):
    """A network whose output is the tuple of its tensors, logits first where it has some, see `named_outputs`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # A tensor that is returned twice, or as it came, needs a value of its own to have a name of its own.
        given: list[torch.Tensor] = [x, *self.network.parameters(), *self.network.buffers()]
        outputs = []
        for tensor in named_outputs(self.network(x)).values():
            outputs.append(tensor.clone() if any(tensor is other for other in given) else tensor)
            given.append(tensor)
        return tuple(outputs)


def named_outputs(output: object) -> dict[str, torch.Tensor]:
    """The tensors of a network's output: a tensor, or tuples, lists, mappings and objects of them, nested.

    The logits of a classifier (see models/outputs.py) come first and are called `logits`; the others have the path to
    them as their name: `aux_logits`, `hidden_states_2`, `output_1` of a plain tuple. A tensor of complex numbers
    gets a last axis of real and imaginary parts. What is no tensor, and objects that are no such container, as a cache
    that only a next call could use, have no place in a file: see `left_out`.
    Raises: InputError: there is no tensor in it.
    """
    try:
        logits = logits_of(output)
    except InputError:
        logits = None
    found = {} if logits is None else {LOGITS: logits}
    for path, leaf in leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf is not logits:
            found[unused(name_of(path), found)] = leaf
    if not found:
        raise InputError(f"the model returned a {type(output).__name__} without a tensor in it.")
    return {name: torch.view_as_real(tensor) if tensor.is_complex() else tensor for name, tensor in found.items()}


def left_out(output: object) -> list[str]:
    """The names of what a file leaves out of an output; None is nothing, so it counts for nothing."""
    return [name_of(path) for path, leaf in leaves(output) if leaf is not None and not isinstance(leaf, torch.Tensor)]


def name_of(path: tuple[str, ...]) -> str:
    """A path as a name that every tool takes: letters, digits and underscores, no digit first."""
    name = re.sub(r"\W", "_", "_".join(path), flags=re.ASCII)
    return name if name[:1].isalpha() else f"output_{name}".rstrip("_")


def unused(name: str, names: Mapping[str, object]) -> str:
    """The name, with a number behind it if others have it already (the input's is taken as well)."""
    number, found = 1, name
    while found in names or found == "input":
        number += 1
        found = f"{name}_{number}"
    return found
