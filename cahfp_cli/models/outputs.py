"""The tensor of logits, and all tensors, in whatever a network returns."""

from collections.abc import Mapping

import torch

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
    if isinstance(hidden, torch.Tensor):
        return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.flatten(2).mean(dim=2)
    if isinstance(output, tuple | list) and output:
        return logits_of(output[0])
    raise InputError(f"the model returned a {type(output).__name__}: it must return a tensor of logits.")


def all_tensors_of(output: object) -> list[torch.Tensor]:
    """The tensors in a network's output, in its order: those within tuples, lists, dictionaries and what else torch's
    pytrees know; of other objects, such as a transformer's cache, only what `logits_of` would take."""
    found = []
    for leaf in torch.utils._pytree.tree_leaves(output):
        fields = [leaf, *(field(leaf, name) for name in ("logits", "last_hidden_state"))]
        found += [value for value in fields if isinstance(value, torch.Tensor)]
    return found


def field(output: object, name: str) -> object:
    """An entry of an output that is a mapping or has attributes, else None."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
