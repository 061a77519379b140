"""Operators of torch that are several products: recurrent layers, Fourier transforms, attention in one piece."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, log2

from cahfp_cli.coupling.trace import Operation, Value
from cahfp_cli.device.operators import ONCE, Operator, Product
from cahfp_cli.device.sizes import Axis, Size

ONE = Axis(1)
FOURIER = frozenset({"_fft_r2c", "_fft_c2c", "_fft_c2r"})
MACS_OF_FOURIER = 2.5
"""Multiply-accumulates of a complex transform of n points, over n log2 n: half its operations (Cooley, Tukey 1965)."""
ATTENTION = frozenset(
    {f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn", "fused")}
    | {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable"}
    | {
        "scaled_dot_product_attention",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_attention_math_for_mps",
    }
)
RECURRENT = frozenset({"recurrent", "mkldnn_rnn_layer"})
COMPOSITE = FOURIER | ATTENTION | RECURRENT


@dataclass(frozen=True)
class Cell:
    """One layer of a recurrent network in one direction: lengths of what it reads, holds, and gives on, and of all its
    gates together; `projected` where what it gives on is a product with what it holds."""

    reads: Axis
    holds: Axis
    gives: Axis
    gates: Axis
    projected: bool


def describe_composite(
    name: str, operation: Operation, values: Sequence[Value], reads: tuple[Size, ...], axis: Callable[..., Axis]
) -> list[Operator]:
    """The operator as kernels, one after the other. Args: reads: of the network's activations; axis: the length of one
    labelled with atoms."""
    if operation.name in RECURRENT:
        return recurrent(name, operation, values, reads, axis)
    if operation.name in FOURIER:
        return fourier(name, operation, values, reads, axis)
    return attention(name, operation, values, reads, axis)


def cells_of(operation: Operation, values: Sequence[Value], axis: Callable[..., Axis]) -> list[list[Cell]]:
    """Of each layer of a recurrent operator, its directions. Weights come as matrices of what is read and of what was
    given on before, two biases or none, and where there is one the projection."""
    read = [values[number] for number in operation.inputs]
    if operation.name == "mkldnn_rnn_layer":
        return [[cell_of([value for value in read[1:5] if len(value.axes) == 2], axis)]]
    weights = read[len(operation.outputs) :]  # after the input, as many states as come out
    directions = operation.constants["directions"]
    cells = len(read[1].axes[0])
    each = len(weights) // cells
    found = [cell_of([w for w in weights[i * each : (i + 1) * each] if len(w.axes) == 2], axis) for i in range(cells)]
    return [found[i : i + directions] for i in range(0, cells, directions)]


def cell_of(matrices: Sequence[Value], axis: Callable[..., Axis]) -> Cell:
    """From its two or three matrices, each (outputs, inputs)."""
    given = axis(matrices[1].axes[1])
    holds = axis(matrices[2].axes[1]) if len(matrices) > 2 else given
    return Cell(axis(matrices[0].axes[1]), holds, given, axis(matrices[0].axes[0]), len(matrices) > 2)


def recurrent(
    name: str, operation: Operation, values: Sequence[Value], reads: tuple[Size, ...], axis: Callable[..., Axis]
) -> list[Operator]:
    """For each cell the product of all steps with what is read, then step by step that with what was given on before
    and the gates; each step reads its weights anew."""
    steps = Size(tuple(axis(labels) for labels in values[operation.inputs[0]].axes[:-1]))
    operators: list[Operator] = []
    for layer, cells in enumerate(cells_of(operation, values, axis)):
        for direction, cell in enumerate(cells):
            own = f"{name}.l{layer}{'r' * direction}"
            entering = reads if not operators else (Size((*steps.axes, cell.reads)),)
            gates, holds = Size((*steps.axes, cell.gates)), Size((*steps.axes, cell.holds))
            gives = Size((*steps.axes, cell.gives))
            operators += [
                product(f"{own}.input", entering, gates, steps, cell.reads, cell.gates),
                product(f"{own}.hidden", (gives,), gates, steps, cell.gives, cell.gates, turns=steps),
                Operator(f"{own}.gates", "math", (gates,), (holds,)),
            ]
            if cell.projected:
                operators.append(product(f"{own}.project", (holds,), gives, steps, cell.holds, cell.gives, turns=steps))
    return operators


def product(
    name: str, reads: tuple[Size, ...], writes: Size, rows: Size, inner: Axis, outer: Axis, turns: Size = ONCE
) -> Operator:
    """A product with a weight of (outer, inner)."""
    own = Product(rows, 1, inner, inner, outer, turns=turns)
    return Operator(name, "matmul", reads, (writes,), (Size((outer, inner)),), own)


def fourier(
    name: str, operation: Operation, values: Sequence[Value], reads: tuple[Size, ...], axis: Callable[..., Axis]
) -> list[Operator]:
    """A fast transform along one axis after the other; of real numbers, or to them, half the work."""
    before, after = values[operation.inputs[0]], values[operation.outputs[0]]
    longer = after if operation.name == "_fft_c2r" else before
    axes = [axis(labels) for labels in longer.axes]
    whole = Size(tuple(axes))
    operators: list[Operator] = []
    share = 1.0 if operation.name == "_fft_c2c" else 0.5
    for dim in operation.constants["dim"]:
        points = len(longer.axes[dim])
        macs = max(1, ceil(share * MACS_OF_FOURIER * log2(max(points, 2))))
        rest = Size(tuple(one for i, one in enumerate(axes) if i != dim % len(axes)))
        work = Product(rest, macs, ONE, ONE, axes[dim])
        operators.append(Operator(f"{name}.{dim}", "matmul", (whole,) if operators else reads, (whole,), (), work))
    return operators


def attention(
    name: str, operation: Operation, values: Sequence[Value], reads: tuple[Size, ...], axis: Callable[..., Axis]
) -> list[Operator]:
    """The products of queries with keys and of their softmax with values; queries (..., n, d), keys (..., m, d)."""
    queries, keys, held = (values[number].axes for number in operation.inputs[:3])
    rows = Size(tuple(axis(labels) for labels in queries[:-1]))
    width, others, out = axis(queries[-1]), axis(keys[-2]), axis(held[-1])
    scores, result = Size((*rows.axes, others)), Size((*rows.axes, out))
    return [
        Operator(f"{name}.scores", "matmul", reads, (scores,), (), Product(rows, 1, width, width, others)),
        Operator(f"{name}.softmax", "math", (scores,), (scores,)),
        Operator(f"{name}.values", "matmul", (scores,), (result,), (), Product(rows, 1, others, others, out)),
    ]
