"""Selecting, cutting and joining along an axis; tables."""

import numpy as np
import torch

from cahfp_cli.coupling.atoms import Labels, fixed
from cahfp_cli.coupling.registry import Axes, Call, Couplings, rule


def replaced(axes: Axes, axis: int, labels: Labels) -> Axes:
    """The same axes with one exchanged."""
    axis %= len(axes)
    return (*axes[:axis], labels, *axes[axis + 1 :])


@rule("cat")
def concatenate(couplings: Couplings, call: Call) -> Axes:
    """Joins the labels along the axis and ties the other axes."""
    parts = [call.axes_of(t) for t in call["tensors"] if t.numel() or t.dim() > 1]
    axis = call.arguments["dim"] % len(parts[0])
    for part in parts[1:]:
        for i, labels in enumerate(part):
            if i != axis:
                couplings.atoms.tie(parts[0][i], labels)
    return replaced(parts[0], axis, np.concatenate([part[axis] for part in parts]))


@rule("stack")
def stack(couplings: Couplings, call: Call) -> Axes:
    """Ties all axes; the new one is as long as the list."""
    parts = [call.axes_of(t) for t in call["tensors"]]
    for part in parts[1:]:
        for a, b in zip(parts[0], part, strict=True):
            couplings.atoms.tie(a, b)
    axis = call["dim"] % (len(parts[0]) + 1)
    return (*parts[0][:axis], fixed(len(parts)), *parts[0][axis:])


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def split(couplings: Couplings, call: Call) -> list[Axes | None]:
    """Cuts the labels. Parts of equal length are tied index by index, so that they stay equal, as `chunk` makes them;
    unequal ones are pinned, since the bounds would move."""
    x, axis = call.axes("self"), call["dim"]
    ends = np.cumsum([part.shape[axis] for part in call.output])[:-1]
    parts = np.split(x[axis], ends)
    for part in parts[1:]:
        if len(part) == len(parts[0]):
            couplings.atoms.tie(parts[0], part)
        else:
            couplings.atoms.pin(x[axis], "split into parts of unequal lengths")
    return [replaced(x, axis, labels) for labels in parts]


@rule("glu")
def gated_half(couplings: Couplings, call: Call) -> Axes:
    """One half of the axis scaled by the other: index i goes together with index i of the other half."""
    x, axis = call.axes("self"), call["dim"]
    value, gate = np.split(x[axis], 2)
    couplings.atoms.tie(value, gate)
    return replaced(x, axis, value)


@rule("slice")
def cut(couplings: Couplings, call: Call) -> Axes:
    """A whole axis passes; a part of an axis that could be pruned is pinned, since the bounds would move."""
    x, axis = call.axes("self"), call["dim"]
    if call.output.shape[axis] == len(x[axis]) and call.arguments.get("step", 1) == 1:
        return x
    couplings.atoms.pin(x[axis], "cut by constant bounds")
    return replaced(x, axis, fixed(call.output.shape[axis]))


@rule("select", "unbind")
def take_one(couplings: Couplings, call: Call) -> Axes | list[Axes | None]:
    """Drops an axis by taking one index of it, or each in turn."""
    x, axis = call.axes("self"), call["dim"] % len(call.axes("self"))
    couplings.atoms.pin(x[axis], "indexed by a constant")
    rest = (*x[:axis], *x[axis + 1 :])
    return rest if isinstance(call.output, torch.Tensor) else [rest for _ in call.output]


@rule("embedding")
def embedding(couplings: Couplings, call: Call) -> Axes:
    """Rows of a table are picked by value, so they are pinned; its columns are channels."""
    weight, indices = call.axes("weight"), call.axes("indices")
    couplings.atoms.pin(weight[0], "rows of an embedding, chosen by value")
    return (*indices, weight[1])
