"""Selecting, cutting and joining along an axis; tables."""

import numpy as np
import torch

from cahfp_cli.coupling.atoms import Labels, fixed
from cahfp_cli.coupling.meta_run import offset_of
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


@rule("split_with_sizes", "unsafe_split_with_sizes")
def split_by_sizes(couplings: Couplings, call: Call) -> list[Axes | None]:
    """Cuts the labels; the op-log check sees whether the sizes follow."""
    return [replaced(call.axes("self"), call["dim"], labels) for labels in cut_into(call)]


@rule("split", "unsafe_split")
def split(couplings: Couplings, call: Call) -> list[Axes | None]:
    """Cuts the labels into parts of one size, tied index by index so that they stay equal (a shorter last part cannot
    follow, so the axis is pinned)."""
    parts = cut_into(call)
    for part in parts[1:]:
        if len(part) == len(parts[0]):
            couplings.atoms.tie(parts[0], part)
        else:
            couplings.atoms.pin(call.axes("self")[call["dim"]], "split into parts of unequal lengths")
    return [replaced(call.axes("self"), call["dim"], labels) for labels in parts]


def cut_into(call: Call) -> list[Labels]:
    """Labels of each part along the axis of a split."""
    axis = call["dim"]
    ends = np.cumsum([part.shape[axis] for part in call.output])[:-1]
    return list(np.split(call.axes("self")[axis], ends))


@rule("glu")
def gated_half(couplings: Couplings, call: Call) -> Axes:
    """One half of the axis scaled by the other: index i goes together with index i of the other half."""
    x, axis = call.axes("self"), call["dim"]
    value, gate = np.split(x[axis], 2)
    couplings.atoms.tie(value, gate)
    return replaced(x, axis, value)


@rule("slice")
def cut(couplings: Couplings, call: Call) -> Axes:
    """A run of indices passes; the op-log check sees whether the bounds follow. With steps the axis is pinned."""
    x, axis = call.axes("self"), call["dim"] % len(call.axes("self"))
    length = len(x[axis])
    if call.arguments.get("step", 1) != 1:
        couplings.atoms.pin(x[axis], "cut with steps")
    found = offset_of(call.op, call.arguments)
    start = 0 if found is None else found[1]
    if call.output.shape[axis] == length:
        return x
    return replaced(x, axis, x[axis][start : start + call.output.shape[axis]])


@rule("select", "unbind")
def take_one(couplings: Couplings, call: Call) -> Axes | list[Axes | None]:
    """Drops an axis by taking one index of it, or each in turn."""
    x, axis = call.axes("self"), call["dim"] % len(call.axes("self"))
    couplings.atoms.pin(x[axis], "indexed by a constant")
    rest = (*x[:axis], *x[axis + 1 :])
    return rest if isinstance(call.output, torch.Tensor) else [rest for _ in call.output]


@rule("index_select")
def pick(couplings: Couplings, call: Call) -> Axes:
    """Entries of one axis are picked by value, so it is pinned."""
    x = call.axes("self")
    couplings.atoms.pin(x[call["dim"]], "entries chosen by value")
    return replaced(x, call["dim"], fixed(len(call.axes("index")[0]) if call.axes("index") else 1))


@rule("index", "_unsafe_index")
def pick_along_axes(couplings: Couplings, call: Call) -> Axes:
    """Axes that are indexed by tensors are pinned, the others pass; as NumPy places them."""
    x, indices = call.axes("self"), list(call["indices"])
    indices += [None] * (len(x) - len(indices))
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        for labels in x:
            couplings.atoms.pin(labels, "entries chosen by a mask")
        return tuple(fixed(n) for n in call.output.shape)
    chosen = [axis for axis, index in enumerate(indices) if index is not None]
    for axis in chosen:
        couplings.atoms.pin(x[axis], "entries chosen by value")
    for index in indices:
        for labels in call.axes_of(index) if index is not None else ():
            couplings.atoms.pin(labels, "axis of an index")
    rest = [labels for axis, labels in enumerate(x) if axis not in chosen]
    together = chosen == list(range(chosen[0], chosen[-1] + 1))
    first = chosen[0] if together else 0
    new = call.output.dim() - len(rest)
    picked = tuple(fixed(n) for n in call.output.shape[first : first + new])
    return (*rest[:first], *picked, *rest[first:])


@rule("gather")
def gather(couplings: Couplings, call: Call) -> Axes:
    """Entries of one axis are picked by value; the other axes are those of the index, entry by entry."""
    x, index, axis = call.axes("self"), call.axes("index"), call["dim"] % len(call.axes("self"))
    couplings.atoms.pin(x[axis], "entries chosen by value")
    for i, (own, other) in enumerate(zip(x, index, strict=True)):
        if i != axis and len(own) == len(other):
            couplings.atoms.tie(own, other)
        elif i != axis:
            couplings.atoms.pin(own, "cut by an index")
    return index


@rule("embedding")
def embedding(couplings: Couplings, call: Call) -> Axes:
    """Rows of a table are picked by value, so they are pinned; its columns are channels."""
    weight, indices = call.axes("weight"), call.axes("indices")
    couplings.atoms.pin(weight[0], "rows of an embedding, chosen by value")
    return (*indices, weight[1])
