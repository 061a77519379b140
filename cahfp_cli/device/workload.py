"""From a trace to a workload: which operators cost what, with sizes that follow the widths."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.coupling.analysis import Analysis
from cahfp_cli.coupling.atoms import Labels
from cahfp_cli.coupling.groups import KEPT, ChannelGroups
from cahfp_cli.coupling.meta_run import BATCH_NORMS
from cahfp_cli.coupling.registry import Axes
from cahfp_cli.coupling.trace import Operation, Trace, Value
from cahfp_cli.device.composite import COMPOSITE, describe_composite
from cahfp_cli.device.modelled import MOVES, NORMS, SUMS, is_pointwise
from cahfp_cli.device.operators import Kind, Layout, Operator, Product, Workload
from cahfp_cli.device.schedule import make_schedule
from cahfp_cli.device.sizes import Axis, Size

Bools = NDArray[np.bool_]

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm"})
VECTOR_PRODUCTS = frozenset({"mv", "addmv", "dot", "vdot"})
OTHER_PRODUCTS = frozenset({"_cdist_forward", "linear", "addbmm", "_trilinear"})
"""Products that runtimes compute as they do others, but whose operands come in another form."""
VIEWS = frozenset(
    {"view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand"}
    | {"detach", "alias", "slice", "select", "split", "split_with_sizes", "unbind", "_to_copy", "lift_fresh"}
)
TRANSPOSED = frozenset({"permute", "transpose"})
"""Views in torch; runtimes move the bytes."""
RENAMED = frozenset({"detach", "alias", "_to_copy", "lift_fresh", "expand", "t"})
"""Views of which nothing is left at run time; the others take a call that moves nothing."""
FUSED = frozenset(
    {"relu", "relu_", "hardtanh", "hardtanh_", "relu6", "clamp", "clamp_min", "native_dropout", "dropout"}
)
"""Activations that runtimes compute while they write a convolution's or product's output."""
CLIPS = frozenset({"hardtanh", "hardtanh_", "relu6", "clamp", "clamp_min"})
"""Of the fused activations those that are computed after the output was written: only ReLU is part of the kernel."""
SAME = frozenset({"add", "add_", "mul", "mul_", "relu", "relu_", *BATCH_NORMS})
POOLS = frozenset({"max_pool2d_with_indices", "max_pool2d", "avg_pool2d"})
"""What runtimes also compute on channels in blocks: element by element, or if the channels fill their blocks."""

MATH = frozenset(
    {"gelu", "erf", "exp", "tanh", "sigmoid", "silu", "hardswish", "_softmax", "_log_softmax", "native_layer_norm"}
    | {"native_group_norm", "_safe_softmax", "mish", "elu", "pow", "sqrt", "rsqrt", "log", "softplus"}
    | {"cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"}
)
"""Operators that compute more with each element than moving it."""
KNOWN = frozenset({"convolution"}).union(
    PRODUCTS, VECTOR_PRODUCTS, OTHER_PRODUCTS, COMPOSITE, VIEWS, FUSED, SAME, POOLS, MATH, SUMS, NORMS, MOVES
)
WINDOW = ("stride", "padding", "dilation")
"""Of a convolution, along each axis."""
STEPS = {"gelu": 4, "_safe_softmax": 2}
"""Elementwise operators that these become in ONNX, beside the one that computes most."""


def make_workload(analysis: Analysis, itemsizes: Mapping[str, int]) -> Workload:
    """The workload of a network at batch 1, from its evaluation-mode trace.

    Args:
        analysis: of the network.
        itemsizes: bytes an element of every tensor of the checkpoint.
    """
    groups, trace = analysis.groups, analysis.traces[0]
    sizes = Sizes(groups, analysis.group_of_atom)
    depends = depends_on_input(trace)
    folded = folded_operations(trace)
    fused = fused_operations(trace, folded)
    storage = storages(trace, depends, folded)
    operators: list[Operator] = []
    made_by: dict[int, int] = {}  # value -> the timed operator that made it
    for number, operation in enumerate(trace.operations):
        if any(depends[value] for value in operation.outputs):
            read = dict.fromkeys(value for value in operation.inputs if depends[value])
            sources = tuple(made_by.get(value) for value in read)
            first, *steps = describe(number, operation, trace, sizes, depends, fused[number])
            operators.append(replace(first, sources=sources if first.reads else ()))
            operators += [replace(one, sources=(len(operators) - 1,)) for one in steps]
            made = len(operators) - 1 if first.reads else sources[0]
            made_by.update({} if made is None else dict.fromkeys(operation.outputs, made))
    buffers, live = liveness(trace, depends, storage)
    return Workload(
        operators=tuple(operators),
        families=len(groups.names),
        full_widths=tuple(np.bincount(groups.family, minlength=len(groups.names)).tolist()),
        parameters=tuple(
            (sizes.of_groups(axes), itemsizes[name]) for name, axes in groups.labels.items() if name in itemsizes
        ),
        buffers=tuple(sizes.of(trace.values[value].axes) for value in buffers),
        live=live,
        schedule=make_schedule(trace, depends, folded, sizes.of),
        unmodelled=unmodelled_operators(trace),
    )


def unmodelled_operators(trace: Trace) -> tuple[str, ...]:
    """Names of operators of which only the bytes are counted, although they may compute much."""
    depends = depends_on_input(trace)
    named = {op.name for op in trace.operations if any(depends[value] for value in op.outputs)}
    return tuple(sorted(name for name in named if name not in KNOWN and not is_pointwise(name)))


class Sizes:
    """Turns labels into lengths that are affine in the widths; remembers each array of labels it has seen."""

    def __init__(self, groups: ChannelGroups, group_of_atom: Labels) -> None:
        self._group_of_atom = group_of_atom
        self._family = groups.family
        self._widths = np.bincount(groups.family, minlength=len(groups.names))
        self._known: dict[int, tuple[Labels, Axis]] = {}

    def axis(self, labels: Labels) -> Axis:
        """The length of an axis labelled with atoms."""
        if id(labels) not in self._known:
            self._known[id(labels)] = (labels, self._axis(self._group_of_atom[labels]))
        return self._known[id(labels)][1]

    def of(self, axes: Axes) -> Size:
        """Number of elements of a tensor of the trace."""
        return Size(tuple(self.axis(labels) for labels in axes))

    def of_groups(self, axes: tuple[Labels, ...]) -> Size:
        """The same for axes labelled with groups already."""
        return Size(tuple(self._axis(labels) for labels in axes))

    def _axis(self, groups: Labels) -> Axis:
        members = groups[groups != KEPT]
        counts = np.bincount(self._family[members], minlength=len(self._widths))
        multiplicity = counts // np.maximum(self._widths, 1)
        # An axis that holds only a part of a family has no whole multiplicity: what is left over counts as constant.
        constant = len(groups) - int((multiplicity * self._widths).sum())
        present = np.flatnonzero(multiplicity)
        return Axis(constant, tuple((int(f), int(multiplicity[f])) for f in present))


def depends_on_input(trace: Trace) -> list[bool]:
    """For each value, whether it is computed from the input; the rest is constant and folded at export."""
    depends = [False] * len(trace.values)
    for value in trace.inputs:
        depends[value] = True
    for operation in trace.operations:
        if any(depends[value] for value in operation.inputs):
            for value in operation.outputs:
                depends[value] = True
    return depends


def storages(trace: Trace, depends: list[bool], folded: list[bool]) -> list[int]:
    """The value in whose memory each value lives: views, folded norms and fused activations take no memory."""
    storage = [value.storage for value in trace.values]
    for operation, is_folded in zip(trace.operations, folded, strict=True):
        activations = [value for value in operation.inputs if depends[value]]
        if operation.outputs and activations and is_folded:
            storage[operation.outputs[0]] = storage[activations[0]]
    return storage


def folded_operations(trace: Trace) -> list[bool]:
    """For each operator, whether a runtime executes it inside its neighbour."""
    products = {value for op in trace.operations if op.name in {"convolution", *PRODUCTS} for value in op.outputs}
    return [
        op.name in VIEWS or op.name in FUSED or (op.name in BATCH_NORMS and op.inputs[0] in products)
        for op in trace.operations
    ]


def fused_operations(trace: Trace, folded: Sequence[bool]) -> list[bool]:
    """What takes no time: as `folded`, but an activation does unless it follows a product, its norm or an addition."""
    fused = list(folded)
    fusing: set[int] = set()
    for number, operation in enumerate(trace.operations):
        follows = bool(operation.inputs) and operation.inputs[0] in fusing
        if operation.name in FUSED:
            fused[number] = follows
        if operation.name in {"convolution", "add", "add_", *PRODUCTS} or (fused[number] and follows):
            fusing.update(operation.outputs)
    return fused


def liveness(
    trace: Trace, depends: list[bool], storage: list[int]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Buffers (as the value that names each), and for each operator the buffers that hold data while it runs."""
    first: dict[int, int] = {storage[value]: 0 for value in trace.inputs}
    last: dict[int, int] = {storage[value]: len(trace.operations) for value in trace.results if depends[value]}
    for step, operation in enumerate(trace.operations):
        for value in (*operation.inputs, *operation.outputs):
            if depends[value]:
                first.setdefault(storage[value], step)
                last[storage[value]] = max(step, last.get(storage[value], step))
    buffers = tuple(first)
    position = {buffer: i for i, buffer in enumerate(buffers)}
    live = [tuple(position[b] for b in buffers if first[b] <= step <= last[b]) for step in range(len(trace.operations))]
    return buffers, tuple(dict.fromkeys(live))


def describe(
    number: int, operation: Operation, trace: Trace, sizes: Sizes, depends: list[bool], is_folded: bool
) -> list[Operator]:
    """The operator with its arithmetic and traffic, and what runtimes compute after it in one more."""
    values = trace.values
    activations = [value for value in operation.inputs if depends[value]]
    constants = [values[value] for value in operation.inputs if not depends[value]]
    out = values[operation.outputs[0]]
    name = operator_name(number, operation, constants)
    reads = tuple(sizes.of(values[value].axes) for value in dict.fromkeys(activations))
    writes = tuple(sizes.of(values[value].axes) for value in operation.outputs)
    weights = tuple(sizes.of(value.axes) for value in constants)
    if operation.name == "convolution":
        kind, product = convolution(operation, constants[0], values[activations[0]], out, sizes)
        return [Operator(name, kind, reads, writes, weights, product)]
    if operation.name in PRODUCTS:
        left = values[operation.inputs[-2] if len(operation.inputs) > 1 else operation.inputs[0]]
        inner = sizes.axis(left.axes[-1])
        product = Product(sizes.of(out.axes[:-1]), 1, inner, inner, sizes.axis(out.axes[-1]))
        multiplied = Operator(name, "matmul", reads, writes, weights, product)
        biased = operation.name == "addmm" and len(out.axes[0]) > 1  # one row has its bias added inside
        return [multiplied, Operator(f"{name}+bias", "math", writes, writes)] if biased else [multiplied]
    if operation.name in COMPOSITE:
        return describe_composite(name, operation, values, reads, sizes.axis)
    if operation.name in VECTOR_PRODUCTS | OTHER_PRODUCTS:
        return [Operator(name, "matmul", reads, writes, weights, other_product(operation, values, out, sizes))]
    if operation.name in TRANSPOSED and len(out.axes) > 2:
        return [Operator(name, "memory", reads, writes)]
    if is_folded and operation.name in CLIPS:
        return [Operator(name, "clip", reads, writes, layout="same")]
    if is_folded and operation.name in VIEWS - RENAMED and len(activations) == 1:
        return [Operator(name, "view")]
    if (is_folded and len(activations) == 1) or operation.name == "clone":  # a copy of what was transposed
        return [Operator(name, "free")]
    moves: Kind = "math" if operation.name in MATH else "pool" if operation.name in POOLS else "memory"
    layout: Layout = "same" if operation.name in SAME else "whole" if operation.name in POOLS | {"cat"} else "plain"
    steps = [Operator(f"{name}+{i}", "memory", writes, writes) for i in range(STEPS.get(operation.name, 0))]
    return [Operator(name, moves, reads, writes, weights, layout=layout), *steps]


def other_product(operation: Operation, values: Sequence[Value], out: Value, sizes: Sizes) -> Product:
    """Of products with vectors, of all pairs of rows, of batches that are summed up, and of three factors."""
    read = [values[value].axes for value in operation.inputs]
    one, rows = Axis(1), sizes.of(out.axes[:-1])
    if operation.name in VECTOR_PRODUCTS:
        inner = sizes.axis((read[-2] if len(read) > 1 else read[0])[-1])
        return Product(sizes.of(out.axes), 1, inner, inner, one)
    last = sizes.axis(out.axes[-1])
    if operation.name == "addbmm":
        inner = sizes.axis(read[-2][-1])
        return Product(sizes.of((read[-2][0], *out.axes[:-1])), 1, inner, inner, last)
    if operation.name == "_trilinear":  # its weight (outputs, n, m) is the middle factor, and all its axes are fixed
        inner = Axis(prod(len(labels) for labels in read[1][1:]))
        return Product(rows, 1, inner, inner, last)
    inner = sizes.axis(read[0][-1])
    return Product(rows, 1, inner, inner, last)


def convolution(operation: Operation, weight: Value, x: Value, out: Value, sizes: Sizes) -> tuple[Kind, Product]:
    """Its kind and product. A transposed one applies its kernel at each position of its input."""
    transposed, several = operation.constants["transposed"], operation.constants["groups"] > 1
    applied = x if transposed else out
    rows = sizes.of((applied.axes[0], *applied.axes[2:]))
    inside = touched = 1.0
    if len(weight.axes) == 4 and not transposed:
        axes = [
            taps_inside(len(x.axes[2 + i]), len(out.axes[2 + i]), len(weight.axes[2 + i]), *options)
            for i, options in enumerate(zip(*(operation.constants[name] for name in WINDOW), strict=True))
        ]
        inside, touched = float(axes[0].mean()), share_touched(*axes)
    taps = prod(len(axis) for axis in weight.axes[2:])
    inputs, outputs = sizes.axis(x.axes[1]), sizes.axis(out.axes[1])
    if not several:
        return "conv", Product(rows, taps, inputs, inputs, outputs, inside, touched)
    if len(weight.axes[1]) == 1:
        return "depthwise", Product(rows, taps, inputs, Axis(1), outputs, inside, touched)
    # Stored transposed, a weight has a group's outputs on its second axis.
    own = Axis(len(weight.axes[0]) // operation.constants["groups"]) if transposed else sizes.axis(weight.axes[1])
    return "grouped", Product(rows, taps, inputs, own, outputs, inside, touched)


def taps_inside(length: int, positions: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> Bools:
    """Which taps of a kernel meet the image, along one axis: boolean (output positions, taps)."""
    place = np.arange(positions)[:, None] * stride - padding + np.arange(kernel) * dilation
    return np.asarray((place >= 0) & (place < length))


def share_touched(*axes: Bools) -> float:
    """The share of a kernel's taps that meet the image at some position, from `taps_inside` of each axis."""
    return prod(float(inside.any(axis=0).mean()) for inside in axes)


def operator_name(number: int, operation: Operation, constants: list[Value]) -> str:
    """The layer whose parameter it uses, or its place and kind."""
    owner = next((value.parameter.name for value in constants if value.parameter is not None), None)
    return owner.rpartition(".")[0] or owner if owner is not None else f"{operation.name}.{number}"
