"""Views: permuting, adding and dropping axes of length 1, regrouping by exact block factorisation."""

from collections.abc import Iterator
from math import prod

import numpy as np

from cahfp_cli.coupling.atoms import Labels, fixed, varies
from cahfp_cli.coupling.registry import Axes, Call, Couplings, rule


@rule("permute")
def permute(couplings: Couplings, call: Call) -> Axes:
    """Carries labels to their new places."""
    x = call.axes("self")
    return tuple(x[d] for d in call["dims"])


@rule("t", "transpose")
def transpose(couplings: Couplings, call: Call) -> Axes:
    """Exchanges two axes."""
    x = list(call.axes("self"))
    if len(x) > 1:
        a, b = call.arguments.get("dim0", 0), call.arguments.get("dim1", 1)
        x[a], x[b] = x[b], x[a]
    return tuple(x)


@rule("view_as_real")
def parts_of_complex(couplings: Couplings, call: Call) -> Axes:
    """A new last axis of two: real and imaginary part."""
    return (*call.axes("self"), fixed(2))


@rule("view_as_complex")
def complex_of_parts(couplings: Couplings, call: Call) -> Axes:
    """Drops the last axis of two."""
    return call.axes("self")[:-1]


@rule("unsqueeze")
def unsqueeze(couplings: Couplings, call: Call) -> Axes:
    """A new axis of length 1."""
    x = call.axes("self")
    axis = call["dim"] % (len(x) + 1)
    return (*x[:axis], fixed(1), *x[axis:])


@rule("squeeze")
def squeeze(couplings: Couplings, call: Call) -> Axes:
    """Drops axes of length 1."""
    x = call.axes("self")
    dims = call.arguments.get("dim")
    wanted = range(len(x)) if dims is None else [d % len(x) for d in ([dims] if isinstance(dims, int) else dims)]
    dropped = {d for d in wanted if len(x[d]) == 1}
    for d in dropped:
        couplings.atoms.pin(x[d], "squeezed axis")
    return tuple(labels for i, labels in enumerate(x) if i not in dropped)


@rule("repeat")
def repeat(couplings: Couplings, call: Call) -> Axes:
    """Copies side by side: index i of every copy goes together."""
    x, times = call.axes("self"), call["repeats"]
    x = (*(fixed(1) for _ in range(len(times) - len(x))), *x)
    for labels, n in zip(x, times, strict=True):
        if n > 1 and len(labels) == 1:
            couplings.atoms.pin(labels, "an axis of length 1 that is repeated")
    return tuple(np.tile(labels, n) for labels, n in zip(x, times, strict=True))


@rule("pixel_shuffle")
def pixel_shuffle(couplings: Couplings, call: Call) -> Axes:
    """Channels become pixels: all those of one new channel go together."""
    *batch, channels, _, _ = call.axes("self")
    by_new_channel = channels.reshape(-1, call["upscale_factor"] ** 2)
    couplings.atoms.tie(channels, np.repeat(by_new_channel[:, 0], by_new_channel.shape[1]))
    height, width = call.output.shape[-2:]
    return (*batch, by_new_channel[:, 0], fixed(height), fixed(width))


@rule("pixel_unshuffle")
def pixel_unshuffle(couplings: Couplings, call: Call) -> Axes:
    """Pixels become channels, those of one old channel side by side."""
    *batch, channels, _, _ = call.axes("self")
    height, width = call.output.shape[-2:]
    return (*batch, np.repeat(channels, call["downscale_factor"] ** 2), fixed(height), fixed(width))


@rule("im2col")
def im2col(couplings: Couplings, call: Call) -> Axes:
    """The window of each position as an axis: channels outside, places in the window inside."""
    batch, channels = call.axes("self")[:2]
    return (batch, np.repeat(channels, prod(call["kernel_size"])), fixed(call.output.shape[-1]))


@rule("col2im")
def col2im(couplings: Couplings, call: Call) -> Axes:
    """The inverse of `im2col`: every place of a channel's window goes together."""
    batch, places = call.axes("self")[:2]
    by_channel = places.reshape(-1, prod(call["kernel_size"]))
    couplings.atoms.tie(places, np.repeat(by_channel[:, 0], by_channel.shape[1]))
    return (batch, by_channel[:, 0], *(fixed(n) for n in call.output.shape[2:]))


@rule("unfold")
def windows(couplings: Couplings, call: Call) -> Axes:
    """Windows along one axis, their places as a new last axis."""
    x = list(call.axes("self"))
    axis = call["dimension"] % len(x)
    couplings.atoms.pin(x[axis], "cut into windows")
    x[axis] = fixed(call.output.shape[axis])
    return (*x, fixed(call["size"]))


@rule("as_strided_")
def restrided(couplings: Couplings, call: Call) -> Axes:
    """Another order in memory passes; anything else that strides can say is pinned."""
    x = call.axes("self")
    if tuple(call["size"]) == tuple(len(labels) for labels in x):
        return x
    for labels in x:
        couplings.atoms.pin(labels, "strides given by the code")
    return tuple(fixed(n) for n in call.output.shape)


@rule("expand")
def expand(couplings: Couplings, call: Call) -> Axes:
    """Old axes pass; repeated ones have a length that the code chose: new atoms, as of any tensor made from sizes."""
    x, shape = call.axes("self"), call.output.shape
    new = len(shape) - len(x)
    for labels, n in zip(x, shape[new:], strict=True):
        if len(labels) != n:
            couplings.atoms.pin(labels, "an axis of length 1 that is expanded")
    fresh = couplings.atoms.fresh_for_size
    old = [labels if len(labels) == n else fresh(n) for labels, n in zip(x, shape[new:], strict=True)]
    return (*(fresh(n) for n in shape[:new]), *old)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy")
def reshape(couplings: Couplings, call: Call) -> Axes:
    """Regroups axes block by block; a block is the shortest run of axes with the same product on both sides."""
    x, shape = call.axes("self"), tuple(call.output.shape)
    for labels in x:
        if len(labels) == 1:
            couplings.atoms.pin(labels, "reshaped axis of length 1")
    result: dict[int, Labels] = {}
    for inputs, outputs in blocks(tuple(len(labels) for labels in x), shape):
        merged = merge(couplings, [x[i] for i in inputs])
        parts = divide(couplings, merged, tuple(shape[o] for o in outputs))
        result.update(zip(outputs, parts, strict=True))
    return tuple(result.get(i, fixed(n)) for i, n in enumerate(shape))


def blocks(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs of runs of axes (by position, those of length 1 left out) with equal products."""
    left = [i for i, n in enumerate(before) if n != 1]
    right = [i for i, n in enumerate(after) if n != 1]
    while left and right:
        run_left, run_right = [left.pop(0)], [right.pop(0)]
        while (a := prod(before[i] for i in run_left)) != (b := prod(after[i] for i in run_right)):
            if a < b:
                run_left.append(left.pop(0))
            else:
                run_right.append(right.pop(0))
        yield run_left, run_right


def merge(couplings: Couplings, axes: list[Labels]) -> Labels:
    """Labels of several axes flattened into one: at most one of them may vary, the outermost that does; rather one that
    belongs to data than one made from a size."""
    candidates = [i for i, labels in enumerate(axes) if varies(labels)]
    varying = min(candidates, key=lambda i: (couplings.atoms.is_sized(axes[i]), i), default=0)
    for labels in axes[:varying] + axes[varying + 1 :]:
        couplings.atoms.pin(labels, "flattened together with an axis that varies")
    outer, inner = prod(len(a) for a in axes[:varying]), prod(len(a) for a in axes[varying + 1 :])
    return np.tile(np.repeat(axes[varying], inner), outer)


def divide(couplings: Couplings, labels: Labels, shape: tuple[int, ...]) -> list[Labels]:
    """Labels of one axis split into several: one of them goes on varying, the others keep their length.

    If the labels are constant along all axes but one, that is the one, and nothing need be tied. Else one axis is
    chosen (the first in `preference` that no trace has shown to be pinned) and what shares an index of it is tied, so
    that what survives stays rectangular.
    """
    if len(shape) == 1 or not varies(labels):
        return [labels] if len(shape) == 1 else [fixed(n) for n in shape]
    block = labels.reshape(shape)
    for axis in range(len(shape)):
        along = first_along(block, axis)
        if (block == along.reshape([-1 if i == axis else 1 for i in range(len(shape))])).all():
            return [along if i == axis else fixed(n) for i, n in enumerate(shape)]
    axis = preference(shape)[couplings.split_choice.setdefault(shape, 0)]
    along = first_along(block, axis)
    couplings.atoms.tie(np.moveaxis(block, axis, -1).reshape(-1), np.tile(along, labels.size // len(along)))
    couplings.splits.append((shape, labels, along))
    return [along if i == axis else fixed(n) for i, n in enumerate(shape)]


def preference(shape: tuple[int, ...]) -> list[int]:
    """Axes of a split in the order to try them: outer before inner, as heads are; but the shortest last, which are
    rather query, key and value, or the groups of a shuffle."""
    return sorted(range(len(shape)), key=lambda axis: (0, axis) if shape[axis] > 3 else (4 - shape[axis], axis))


def first_along(block: Labels, axis: int) -> Labels:
    """The labels met when walking along one axis at index 0 of all others."""
    labels: Labels = np.moveaxis(block, axis, -1).reshape(-1, block.shape[axis])[0]
    return labels
