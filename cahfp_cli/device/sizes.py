"""A network reduced to sizes, as functions of the widths: how many channel groups each family keeps.

Every axis length is affine in the widths, so every count of elements is a product of such functions, and everything
that a budget limits is a sum of those products. They are compiled once into index arrays; evaluating candidates is then
a few NumPy operations on a whole batch of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
T = TypeVar("T")
Kind = Literal["conv", "grouped", "depthwise", "matmul", "memory", "math", "free"]
"""grouped: convolution of several groups; memory: moves bytes (pool, add, concat); math: computes much with each
element (softmax, layer norm); free: folded or fused into a neighbour (batch norm, activation, reshape)."""

ITEM_BYTES = 4
"""Activations and weights of operators are fp32."""


@dataclass(frozen=True)
class Axis:
    """A length: constant + the sum over (family, multiplicity) of multiplicity x widths[family]."""

    constant: int
    terms: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Size:
    """A number of elements: the product of the axis lengths (1 without axes)."""

    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product as its kernel sees it: rows x taps x contracted x outputs multiply-accumulates.

    rows: output positions; taps: elements of the kernel. inputs: channels read, contracted: those that each output
    depends on (fewer by the number of groups); outputs: channels written. inside: share of the taps that do not lie
    above or below the image, where kernels leave them out.
    """

    rows: Size
    taps: int
    inputs: Axis
    contracted: Axis
    outputs: Axis
    inside: float = 1.0

    @property
    def macs(self) -> Size:
        """Multiply-accumulates."""
        return Size((*self.rows.axes, Axis(self.taps), self.contracted, self.outputs))


@dataclass(frozen=True)
class Operator:
    """One operator at batch 1. reads, writes, weights: elements, each a sum of sizes. product: of the kinds that
    multiply, None of others. source: the number of the operator that made its first input, None for the network's own.
    """

    name: str
    kind: Kind
    reads: tuple[Size, ...] = ()
    writes: tuple[Size, ...] = ()
    weights: tuple[Size, ...] = ()
    product: Product | None = None
    source: int | None = None


@dataclass(frozen=True)
class Workload:
    """A network as a device sees it.

    full_widths: (families,) groups of the unpruned network; parameters: each stored tensor, buffers included, with its
    bytes per element; buffers: activations; live: for each step of execution, the buffers that hold data during it.
    """

    operators: tuple[Operator, ...]
    families: int
    full_widths: tuple[int, ...]
    parameters: tuple[tuple[Size, int], ...]
    buffers: tuple[Size, ...] = ()
    live: tuple[tuple[int, ...], ...] = ()


class Sums:
    """Several sums of weighted sizes at once: called with widths (batch, families), returns (batch, sums).

    Counts stay below 2^53, so float64 holds them exactly and the order of summation does not matter.
    """

    def __init__(self, sums: Sequence[Sequence[tuple[Size, int]]], families: int) -> None:
        sizes = Numbering(size for terms in sums for size, _ in terms)
        axes = Numbering(axis for size in sizes.items for axis in size.axes)
        one = axes[Axis(1)]  # fills up sizes of fewer axes than the largest
        depth = max((len(size.axes) for size in sizes.items), default=1)
        padded = [[*(axes[axis] for axis in size.axes), *[one] * (depth - len(size.axes))] for size in sizes.items]
        self._factors = np.array(padded, int).reshape(-1, depth).T

        self._constants = np.array([axis.constant for axis in axes.items], np.float64)
        self._multiplicities = np.zeros((families, len(axes.items)))
        for index, axis in enumerate(axes.items):
            for family, multiplicity in axis.terms:
                self._multiplicities[family, index] += multiplicity

        # reduceat cannot sum nothing, so every sum gets one term of weight 0.
        terms = [[*((sizes[size], weight) for size, weight in sum_), (0, 0)] for sum_ in sums]
        self._terms = np.array([size for sum_ in terms for size, _ in sum_], int)
        self._weights = np.array([weight for sum_ in terms for _, weight in sum_], np.float64)
        self._starts = np.cumsum([0, *(len(sum_) for sum_ in terms)])[:-1]
        self._empty = not sizes.items

    def __call__(self, widths: Array) -> Array:
        if self._empty:
            return np.zeros((len(widths), len(self._starts)))
        lengths = widths @ self._multiplicities + self._constants
        sizes = lengths.take(self._factors[0], axis=1)
        for factor in self._factors[1:]:
            sizes *= lengths.take(factor, axis=1)
        terms = sizes.take(self._terms, axis=1)
        terms *= self._weights
        return np.add.reduceat(terms, self._starts, axis=1)


class Numbering(Generic[T]):
    """Distinct items in order of first appearance, each with its number."""

    def __init__(self, items: Iterable[T]) -> None:
        self.items = list(dict.fromkeys(items))
        self._numbers = {item: number for number, item in enumerate(self.items)}

    def __getitem__(self, item: T) -> int:
        if item not in self._numbers:
            self._numbers[item] = len(self.items)
            self.items.append(item)
        return self._numbers[item]


def check(workload: Workload) -> None:
    """Raise ValueError for what would otherwise be read from the wrong place, or break monotonicity."""
    if len(workload.full_widths) != workload.families:
        raise ValueError(f"{len(workload.full_widths)} full widths for {workload.families} families")
    sizes = [size for size, _ in workload.parameters] + list(workload.buffers)
    for operator in workload.operators:
        if operator.kind not in get_args(Kind):
            raise ValueError(f"operator '{operator.name}' has the unknown kind '{operator.kind}'")
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
