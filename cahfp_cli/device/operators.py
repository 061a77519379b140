"""What a network consists of, as a device sees it: operators with their sizes, stored tensors, live activations."""

from dataclasses import dataclass
from typing import Literal, get_args

from cahfp_cli.device.arena import Schedule
from cahfp_cli.device.sizes import Axis, Size

Kind = Literal["conv", "grouped", "depthwise", "matmul", "pool", "memory", "math", "clip", "view", "free"]
"""grouped: convolution of several groups; pool: over windows; memory: moves bytes (add, concat); math: computes much
with each element (softmax, layer norm); clip: an activation that kernels apply to what they have written; view: another
shape of the same bytes; free: folded or fused into a neighbour (batch norm, ReLU)."""
Layout = Literal["plain", "same", "whole"]
"""How an operator that is no convolution takes channels that come in blocks: not at all; as they are, if all its inputs
come so; or that only if the channels of each input fill their blocks."""


ONCE = Size(())


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product as its kernel sees it: rows x taps x contracted x outputs multiply-accumulates.

    rows: output positions; taps: elements of the kernel. inputs: channels read, contracted: those that each output
    depends on (fewer by the number of groups); outputs: channels written. inside: share of the taps that do not lie
    above or below the image, where kernels leave them out. touched: share of the kernel that meets the image anywhere:
    of one of 3x3 on an image of one pixel, only the middle is ever read. turns: in how many turns, one after the other,
    the rows are computed, as the steps of a recurrent layer are; each reads the weights anew.
    """

    rows: Size
    taps: int
    inputs: Axis
    contracted: Axis
    outputs: Axis
    inside: float = 1.0
    touched: float = 1.0
    turns: Size = ONCE

    @property
    def macs(self) -> Size:
        """Multiply-accumulates."""
        return Size((*self.rows.axes, Axis(self.taps), self.contracted, self.outputs))


@dataclass(frozen=True)
class Operator:
    """One operator at batch 1. reads, writes, weights: elements, each a sum of sizes. product: of the kinds that
    multiply, None of others. sources: the number of the operator that made each of `reads`, None for the network's
    input. layout: see its type; it does not count for convolutions.
    """

    name: str
    kind: Kind
    reads: tuple[Size, ...] = ()
    writes: tuple[Size, ...] = ()
    weights: tuple[Size, ...] = ()
    product: Product | None = None
    sources: tuple[int | None, ...] = ()
    layout: Layout = "plain"


@dataclass(frozen=True)
class Workload:
    """A network as a device sees it.

    full_widths: (families,) groups of the unpruned network; parameters: each stored tensor, buffers included, with its
    bytes per element; buffers: activations; live: for each step of execution, the buffers that hold data during it.
    schedule: the same as ONNX Runtime executes it, None where that is not known. unmodelled: names of operators that
    are taken for copies, since nothing else is known of what they cost.
    """

    operators: tuple[Operator, ...]
    families: int
    full_widths: tuple[int, ...]
    parameters: tuple[tuple[Size, int], ...]
    buffers: tuple[Size, ...] = ()
    live: tuple[tuple[int, ...], ...] = ()
    schedule: Schedule | None = None
    unmodelled: tuple[str, ...] = ()


def check(workload: Workload) -> None:
    """Raise ValueError for what would otherwise be read from the wrong place, or break monotonicity."""
    if len(workload.full_widths) != workload.families:
        raise ValueError(f"{len(workload.full_widths)} full widths for {workload.families} families")
    sizes = [size for size, _ in workload.parameters] + list(workload.buffers)
    for operator in workload.operators:
        if operator.kind not in get_args(Kind):
            raise ValueError(f"operator '{operator.name}' has the unknown kind '{operator.kind}'")
        if len(operator.sources) > len(operator.reads):
            raise ValueError(f"operator '{operator.name}' has more sources than it reads")
        sizes += [
            *([operator.product.macs] if operator.product else []),
            *operator.reads,
            *operator.writes,
            *operator.weights,
        ]
    for axis in {axis for size in sizes for axis in size.axes}:
        if axis.constant < 0 or any(multiplicity < 0 for _, multiplicity in axis.terms):
            raise ValueError(f"{axis} shrinks as widths grow")
        if any(not 0 <= family < workload.families for family, _ in axis.terms):
            raise ValueError(f"{axis} names a family beyond {workload.families}")
    if any(not 0 <= index < len(workload.buffers) for step in workload.live for index in step):
        raise ValueError("a step of execution names a buffer that is not there")
