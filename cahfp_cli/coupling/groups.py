"""Channel groups: what the solved atoms say about each axis of each tensor."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.coupling.atoms import Atoms, Labels
from cahfp_cli.coupling.registry import Axes, Consumption

KEPT = -1
"""Label of an index that belongs to no group: pinned, or never touched by anything prunable."""


@dataclass(frozen=True, eq=False)
class Consumer:
    """A call that contracts channels with a parameter.

    call: its number among the contracting calls (`calls.CONTRACTING`) of a forward pass in evaluation mode.
    tensor, axis: the parameter, or the one that the weight is computed from, and its contracted axis.
    groups: int64 (channels,), the group of each channel that the call reads, or KEPT.
    """

    call: int
    tensor: str
    axis: int
    groups: Labels


@dataclass(frozen=True)
class ChannelGroups:
    """Every channel group of a network.

    labels: for each tensor of the state dict, per axis an int64 array (axis length,) with the group of each index,
        or KEPT.
    unsaved: the same for buffers that the state dict leaves out and that lose entries; the model's code makes them.
    family: int64 (groups,): groups of one family cover the same axes of the same tensors and are interchangeable,
        as the channels of one layer are; families are what has a width.
    names: one name a family, that of the first tensor it covers.
    consumers: the calls that contract channels, by a convolution or a matrix product: zeroing a group in what they
        read, and nowhere else, removes it.
    narrowest: int64 (families,), the fewest groups of each that were shown to run: with fewer, the model's code may do
        something else.
    pinned: for each (tensor, axis) that cannot be pruned at all, why.
    not_mask_equivalent: for each family that is not, why removing differs from zeroing.
    """

    labels: Mapping[str, tuple[Labels, ...]]
    unsaved: Mapping[str, tuple[Labels, ...]]
    family: Labels
    names: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    narrowest: Labels
    pinned: Mapping[tuple[str, int], str]
    not_mask_equivalent: Mapping[int, str]

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(self.family)

    def widths(self, kept: NDArray[np.bool_]) -> Labels:
        """Number of kept groups a family, int64 (families,), of a boolean mask (groups,)."""
        return np.bincount(self.family[kept], minlength=len(self.names)).astype(np.int64)

    def indices(self, kept: NDArray[np.bool_]) -> dict[str, tuple[NDArray[np.int32] | None, ...]]:
        """Surviving indices of every axis of every tensor, increasing; None where the whole axis survives."""
        alive = np.append(kept, True)  # label -1 picks the last entry: what belongs to no group survives

        def axis_indices(labels: Labels) -> NDArray[np.int32] | None:
            survives = alive[labels]
            return None if survives.all() else np.flatnonzero(survives).astype(np.int32)

        return {
            name: tuple(axis_indices(labels) for labels in axes)
            for name, axes in {**self.labels, **self.unsaved}.items()
        }

    def restricted(self, kept: NDArray[np.bool_]) -> "ChannelGroups":
        """The groups of the network that is left when only `kept` survive, numbered as before without the others.

        Families keep their numbers, also those of which nothing is left.
        """
        number = np.append(np.where(kept, np.cumsum(kept) - 1, KEPT), KEPT)
        alive = np.append(kept, True)

        def surviving(labels: Labels) -> Labels:
            left: Labels = number[labels[alive[labels]]]
            return left

        return replace(
            self,
            labels={name: tuple(map(surviving, axes)) for name, axes in self.labels.items()},
            unsaved={name: tuple(map(surviving, axes)) for name, axes in self.unsaved.items()},
            family=self.family[kept],
            consumers=tuple(replace(consumer, groups=surviving(consumer.groups)) for consumer in self.consumers),
        )

    def sizes(self, tensors: Iterable[str] | None = None) -> Labels:
        """Elements of some tensors that belong to each group, int64 (groups,); one that two groups share counts for
        both.

        Args: tensors: their names, without it all; of tied ones one name is enough, each counts.
        """
        sizes = np.zeros(self.count + 1, dtype=np.int64)
        for axes in self.labels.values() if tensors is None else (self.labels.get(name, ()) for name in tensors):
            elements = math.prod(len(labels) for labels in axes)
            for labels in axes:
                np.add.at(sizes, labels, elements // max(len(labels), 1))
        return sizes[:-1]  # the last entry collected what is KEPT


def solve(
    atoms: Atoms, tensors: Mapping[str, Axes], buffers: Mapping[str, Axes], consumptions: Sequence[Consumption]
) -> tuple[ChannelGroups, Labels]:
    """Turn ties into groups.

    Args:
        atoms: with all ties, pins and remarks of the traces.
        tensors: labels of the tensors that can be pruned, by state-dict name, in the order that numbers the groups.
        buffers: labels of those that the state dict leaves out.
        consumptions: of the trace in evaluation mode.
    Returns:
        The groups, and for each atom its group or KEPT, int64 (atoms,), for labels of anything else in the traces.
    """
    component = atoms.solve()
    touched = [labels for axes in tensors.values() for labels in axes]
    everything = component[np.concatenate(touched)] if touched else np.zeros(0, np.int64)
    order = everything[np.sort(np.unique(everything, return_index=True)[1])]
    order = order[order != component[0]]
    group_of_component = np.full(component.max() + 1, KEPT, dtype=np.int64)
    group_of_component[order] = np.arange(len(order))
    group_of_atom = group_of_component[component]

    labels = {name: tuple(group_of_atom[a] for a in axes) for name, axes in tensors.items()}
    unsaved = {name: tuple(group_of_atom[a] for a in axes) for name, axes in buffers.items()}
    family, names = families(labels, len(order))
    return (
        ChannelGroups(
            labels=labels,
            unsaved={name: axes for name, axes in unsaved.items() if any((a != KEPT).any() for a in axes)},
            family=family,
            names=names,
            narrowest=np.ones(len(names), dtype=np.int64),
            consumers=tuple(Consumer(c.call, c.tensor, c.axis, group_of_atom[c.labels]) for c in consumptions),
            pinned=why_pinned(atoms, tensors, labels),
            not_mask_equivalent=remarks(atoms, group_of_atom, family),
        ),
        group_of_atom,
    )


def families(labels: Mapping[str, tuple[Labels, ...]], groups: int) -> tuple[Labels, tuple[str, ...]]:
    """Number the families in order of first appearance, and name each after the first tensor it covers."""
    family = np.zeros(groups, dtype=np.int64)
    first = np.full(groups, -1)
    next_number = 1
    for i, axes in enumerate(labels.values()):
        for axis_labels in axes:
            members, counts = np.unique(axis_labels[axis_labels >= 0], return_counts=True)
            if len(members):
                # Split every family by whether, and how often, its members are on this axis.
                _, part = np.unique(family[members] * (len(axis_labels) + 1) + counts, return_inverse=True)
                family[members] = next_number + part
                next_number += int(part.max()) + 1
                first[members] = np.where(first[members] < 0, i, first[members])
    _, appearance, number = np.unique(family, return_index=True, return_inverse=True)
    in_order = np.argsort(appearance)
    renumbered = np.empty(len(in_order), dtype=np.int64)
    renumbered[in_order] = np.arange(len(in_order))
    tensor_names = list(labels)
    return renumbered[number], tuple(tensor_names[i] for i in first[appearance[in_order]])


def why_pinned(
    atoms: Atoms, tensors: Mapping[str, Axes], labels: Mapping[str, tuple[Labels, ...]]
) -> dict[tuple[str, int], str]:
    """For each axis of length above 1 without any group: the first pin that it is tied to, if one is named."""
    reasons = atoms.reasons()
    found = {}
    for name, axes in labels.items():
        for axis, axis_labels in enumerate(axes):
            if len(axis_labels) > 1 and (axis_labels == KEPT).all():
                own = (reasons.get(atom) for atom in tensors[name][axis].tolist())
                found[name, axis] = next((reason for reason in own if reason), "tied to an axis of fixed length")
    return found


def remarks(atoms: Atoms, group_of_atom: Labels, family: Labels) -> dict[int, str]:
    """For each family whose removal is not the same as zeroing: the first reason."""
    found: dict[int, str] = {}
    for remark in atoms.not_mask_equivalent:
        groups = group_of_atom[remark.atoms]
        for number in np.unique(family[groups[groups >= 0]]).tolist():
            found.setdefault(number, remark.reason)
    return found
