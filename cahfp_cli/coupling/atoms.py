"""Atoms: one integer for every index of every axis; what must live or die together is tied.

Invariants:
- Atom 0 is *pinned*: whatever is tied to it, directly or through others, is never pruned.
- Ties are only recorded while tracing and solved once, by connected components.
- A reason is kept for every pin and for every remark, so that a report can say why.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
"""One atom for each index of one axis, shape (axis length,)."""

PINNED = 0


def fixed(length: int) -> Labels:
    """An axis whose length never changes (batch, space, time, classes): every index pinned."""
    return np.zeros(length, dtype=np.int64)


def varies(labels: Labels) -> bool:
    """Whether an axis can still lose indices."""
    return bool(labels.any())


@dataclass(frozen=True)
class Remark:
    """A statement about some atoms: why they are pinned, or why masking is not the same as removing them."""

    atoms: Labels
    reason: str


@dataclass
class Atoms:
    """Hands out atoms and records ties; see the module's invariants."""

    count: int = 1
    pairs: list[tuple[Labels, Labels]] = field(default_factory=list)
    pins: list[Remark] = field(default_factory=list)
    not_mask_equivalent: list[Remark] = field(default_factory=list)
    sized: set[int] = field(default_factory=set)

    def fresh(self, length: int) -> Labels:
        """New atoms, tied to nothing yet."""
        first = self.count
        self.count += length
        return np.arange(first, self.count, dtype=np.int64)

    def fresh_for_size(self, length: int) -> Labels:
        """New atoms for an axis whose length the model's code chose: it may be that of something prunable, or not."""
        labels = self.fresh(length)
        self.sized.update(labels[:1].tolist())
        return labels

    def is_sized(self, labels: Labels) -> bool:
        """Whether an axis is one of those, as it was made."""
        return len(labels) > 0 and int(labels[0]) in self.sized

    def tie(self, a: Labels, b: Labels) -> None:
        """Index i of `a` and index i of `b` are kept or removed together; shapes are equal or `b` has one atom."""
        if a is not b:
            self.pairs.append((a, np.broadcast_to(b, a.shape)))

    def pin(self, labels: Labels, reason: str) -> None:
        """Never prune these, and remember why."""
        if varies(labels):
            self.pins.append(Remark(labels, reason))
            self.tie(labels.reshape(-1), fixed(1))

    def remark(self, labels: Labels, reason: str) -> None:
        """Pruning these is allowed but differs from setting them to zero, and why."""
        if varies(labels):
            self.not_mask_equivalent.append(Remark(labels, reason))

    def solve(self) -> Labels:
        """The component of every atom, named after its smallest atom, shape (count,); that of the pinned ones is 0."""
        return self.components(*self.ends())

    def reasons(self) -> dict[int, str]:
        """Why atoms are pinned: the first pin among all that an atom is tied to by way of atoms that vary."""
        left, right = self.ends()
        free = (left != PINNED) & (right != PINNED)
        component = self.components(left[free], right[free])
        first: dict[int, str] = {}
        for pin in self.pins:
            for number in np.unique(component[pin.atoms]).tolist():
                first.setdefault(number, pin.reason)
        return {atom: first[number] for atom, number in enumerate(component.tolist()) if atom and number in first}

    def ends(self) -> tuple[Labels, Labels]:
        """All ties as two arrays of atoms."""
        left = np.concatenate([np.zeros(1, np.int64), *(a for a, _ in self.pairs)])
        return left, np.concatenate([np.zeros(1, np.int64), *(b for _, b in self.pairs)])

    def components(self, left: Labels, right: Labels) -> Labels:
        """Connected components, each named after its smallest atom, shape (count,)."""
        root = np.arange(self.count, dtype=np.int64)
        while len(left):
            low, high = np.minimum(root[left], root[right]), np.maximum(root[left], root[right])
            np.minimum.at(root, high, low)
            while not np.array_equal(root, higher := root[root]):
                root = higher
            apart = root[left] != root[right]
            left, right = left[apart], right[apart]
        return root
