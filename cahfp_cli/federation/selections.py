"""Which channel groups a client trains, as each method chooses them: a mask, boolean (groups,)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.coupling.groups import ChannelGroups
from cahfp_cli.federation.devices import Device, smallest
from cahfp_cli.federation.memory import Mask, Memory
from cahfp_cli.federation.streams import Purpose, derived
from cahfp_cli.pruning.selection import strongest
from cahfp_cli.pruning.target import Widths
from cahfp_cli.significance.registry import Evidence, find_criterion


@dataclass(frozen=True)
class Situation:
    """What a selection may look at in round `number`: the global network and its tensors, the fleet, the memory."""

    seed: int
    number: int
    groups: ChannelGroups
    devices: tuple[Device, ...]
    network: nn.Module
    weights: Mapping[str, Array]
    memory: Memory


Choose = Callable[[Situation, int], Mask]
"""Called with the situation and the client's number."""


def full(situation: Situation, client: int) -> Mask:
    """Everything, whatever the device can hold."""
    return np.ones(situation.groups.count, dtype=bool)


def smallest_common(situation: Situation, client: int) -> Mask:
    """The first channels of every layer, as many as the weakest device holds: the same network for all."""
    return first_of(situation.groups, smallest(situation.devices))


def prefix(situation: Situation, client: int) -> Mask:
    """The first channels of every layer (Diao et al. 2021, HeteroFL)."""
    return first_of(situation.groups, situation.devices[client].widths)


def rolling(situation: Situation, client: int) -> Mask:
    """A window over each layer's channels that moves on by one each round, around and around (Alam et al. 2022)."""
    kept = np.zeros(situation.groups.count, dtype=bool)
    for number, width in enumerate(situation.devices[client].widths):
        members = np.flatnonzero(situation.groups.family == number)
        kept[members[(situation.number + np.arange(width)) % len(members)]] = True
    return kept


def ordered(situation: Situation, client: int) -> Mask:
    """The first channels at a width drawn each round from those of the fleet that the device holds (Horvath et al.
    2021, whose FjORD draws anew for each batch)."""
    own = situation.devices[client].widths
    held = {tuple(d.widths.tolist()) for d in situation.devices if (d.widths <= own).all()}
    choices = sorted(held)
    drawn = np.random.default_rng(derived(Purpose.SELECTION, situation.seed, situation.number, client))
    return first_of(situation.groups, np.array(choices[int(drawn.integers(len(choices)))], np.int64))


def random(situation: Situation, client: int) -> Mask:
    """Channels drawn once for each client, as many in each layer as for the prefix, and kept for ever."""
    drawn = np.random.default_rng(derived(Purpose.SELECTION, situation.seed, client))
    worth = drawn.random(situation.groups.count)
    return strongest(worth, situation.groups.family, situation.devices[client].widths)


def magnitude(situation: Situation, client: int) -> Mask:
    """The channels of the largest weights in the global network, chosen anew each round (as FIARSE, Wu et al. 2024,
    does for single weights)."""
    evidence = Evidence(situation.network, situation.groups, situation.weights, None, None, situation.seed)
    worth = find_criterion("l2").function(evidence)
    return strongest(worth, situation.groups.family, situation.devices[client].widths)


def remembered(situation: Situation, client: int) -> Mask:
    """What scores chose when they were last renewed, see `scoring.renewed`."""
    return np.asarray(situation.memory.masks[client])


def first_of(groups: ChannelGroups, widths: Widths) -> Mask:
    """The first `widths[f]` groups of each family f."""
    return strongest(-np.arange(groups.count, dtype=np.float64), groups.family, widths)


def picked(devices: int, wanted: int, eligible: NDArray[np.bool_], seed: int, number: int) -> NDArray[np.int64]:
    """The clients of a round, increasing: the first `wanted` eligible ones of a random order of all."""
    order = np.random.default_rng(derived(Purpose.PARTICIPANTS, seed, number)).permutation(devices)
    return np.sort(order[eligible[order]][:wanted])
