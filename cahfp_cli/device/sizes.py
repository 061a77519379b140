"""Sizes that follow the widths: every axis length is an affine function of them, every size a product of lengths."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A length: constant + the sum over (family, multiplicity) of multiplicity x widths[family]."""

    constant: int
    terms: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Size:
    """A number of elements: the product of the axis lengths (1 without axes)."""

    axes: tuple[Axis, ...]
