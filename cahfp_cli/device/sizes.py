"""A network reduced to sizes, as functions of the widths: how many channel groups each family keeps.

Every axis length is affine in the widths, so every count of elements is a product of such functions, and everything
that a budget limits is a sum of those products. They are compiled once into index arrays; evaluating candidates is then
a few NumPy operations on a whole batch of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
T = TypeVar("T")
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
