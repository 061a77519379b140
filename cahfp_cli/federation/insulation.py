"""A start in which no submodel feels what it lacks: the weights are zero by which a channel group that some device
holds reads a group which that device lacks.

With random weights in their place, the wider a submodel is, the more noise its channels that all devices hold read from
channels that few devices train. Without them a nested family of submodels begins as one function inside the next, and
each of these weights grows from zero by the gradients of those who hold both its ends.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.coupling.groups import KEPT, ChannelGroups
from cahfp_cli.federation.memory import Mask


def insulated(arrays: Mapping[str, Array], groups: ChannelGroups, masks: Mask) -> dict[str, Array]:
    """The tensors of a network with those weights set to zero; others are the same arrays.

    Args: arrays: the state dict. masks: boolean (devices, groups), what each device holds.
    """
    found = dict(arrays)
    kinds = np.unique(masks, axis=0)
    for name, axis in sorted({(consumer.tensor, consumer.axis) for consumer in groups.consumers}):
        labels = groups.labels[name]
        reader = 1 - axis  # the weights of convolutions and products begin with outputs and inputs, or the reverse
        felt = held(kinds, labels[reader]).T.astype(np.int64) @ ~held(kinds, labels[axis]) > 0
        if felt.any():
            by_axis = felt if reader == 0 else felt.T
            across = by_axis.reshape(*by_axis.shape, *[1] * (len(labels) - 2))
            found[name] = np.where(across, found[name].dtype.type(0), found[name])
    return found


def held(masks: Mask, labels: NDArray[np.int64]) -> Mask:
    """Whether each mask holds each index of an axis, boolean (masks, length); what belongs to no group always is."""
    return np.asarray(masks[:, labels] | (labels == KEPT))
