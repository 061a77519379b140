"""How the gates of a network can be measured, found out on a few of its samples before the rest are.

Two things that backward passes say must not be taken at their word:

- *No gradient* comes from what a network computes without autograd, from operators without a derivative and from those
  whose derivative is zero wherever it exists (`round`, `sign`); it also comes from what is dead and worth nothing. They
  differ in what happens without it: whoever's removal changes the logits was not reached.
- *Rows* of what a product reads are taken for those of the samples. Where they are not, since they come from parameters
  alone or their number depends on the values, a backward pass over a batch adds samples up.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from cahfp_cli.coupling.groups import KEPT, ChannelGroups
from cahfp_cli.errors import CahfpError, InputError
from cahfp_cli.running.logits import class_rows, run_network
from cahfp_cli.significance.consumers import ConsumerInputs, LiftedStops, Reach, logits_without
from cahfp_cli.significance.gates import GatedPass, RowsError

PROBES = 4
"""Samples that are looked at, from all over the calibration set."""
TOLERANCE = 1e-3
"""Of the largest logit: more than that is no rounding, where a sample is run alone and in a batch."""


def find_reach(model: nn.Module, groups: ChannelGroups, samples: torch.Tensor, batch_size: int) -> Reach:
    """How the gates of a network can be measured.

    Args: model: in evaluation mode. samples: (n, ...) on any device; a batch of them is run, and `PROBES` a few times.
    Raises: InputError: the network fails on them, gives no logits, or its samples influence one another.
    """
    chosen = np.linspace(0, len(samples) - 1, min(PROBES, len(samples))).astype(np.int64)
    device = next(model.parameters()).device
    probe, batch = samples[torch.from_numpy(chosen)].to(device), samples[:batch_size].to(device)
    with torch.no_grad():  # without anything of ours in between: whatever fails here is the network's
        logits = class_rows(run_network(model, probe), len(probe))
    if groups.count == 0 or not torch.isfinite(logits).all():  # nothing to measure, or nothing the caller accepts
        return Reach()
    alone = has_other_rows(model, groups, batch) or not rows_are_found(model, groups, probe)
    parts = torch.split(probe, 1 if alone else len(probe))
    lifted, silent = silent_consumers(model, groups, parts)
    return Reach(lifted, frozenset(call for call in silent if matters(model, groups, parts, call)), alone)


def has_other_rows(model: nn.Module, groups: ChannelGroups, batch: torch.Tensor) -> bool:
    """Whether the network runs other products on a batch than on one sample, or some product's rows do not grow with
    the batch."""

    def watched(samples: torch.Tensor) -> tuple[int, list[tuple[int, int]]]:
        collector = ConsumerInputs(groups)
        with torch.no_grad():
            collector.run(model, samples, lifted=False)
        return collector.calls, [(consumer.call, x.numel()) for consumer, x, _ in collector.seen]

    if len(batch) == 1:
        return False
    calls, one = watched(batch[:1])
    try:
        return watched(batch) != (calls, [(call, numbers * len(batch)) for call, numbers in one])
    except InputError:
        return True


def rows_are_found(model: nn.Module, groups: ChannelGroups, probe: torch.Tensor) -> bool:
    """Whether a batch's rows hold its samples one after the other or in turn. Raises: InputError: samples mix."""
    try:
        GatedPass(model, groups, probe).strides  # noqa: B018
    except RowsError as error:
        with torch.no_grad():
            batch = class_rows(model(probe), len(probe))
            single = torch.cat([class_rows(model(part), 1) for part in torch.split(probe, 1)])
        if (batch - single).abs().max() > TOLERANCE * batch.abs().max():
            raise InputError("gates cannot be measured: samples of a batch influence one another") from error
        return False
    except Exception:  # no gradients at all, which `silent_consumers` finds out
        return True
    return True


def silent_consumers(
    model: nn.Module, groups: ChannelGroups, parts: Sequence[torch.Tensor]
) -> tuple[bool, frozenset[int]]:
    """Whether the network's stops can be lifted, and the numbers of the consumers from which no gradient comes: all of
    them, where autograd fails on the network."""
    for lifted in (True, False):
        try:
            return lifted, frozenset.intersection(*(without_gradient(model, groups, part, lifted) for part in parts))
        except CahfpError:
            raise
        except Exception:  # what the network does to tensors that have gradients, or an operator without a derivative
            continue
    return False, frozenset(ConsumerInputs(groups).consumers)


def without_gradient(model: nn.Module, groups: ChannelGroups, samples: torch.Tensor, lifted: bool) -> frozenset[int]:
    """Numbers of the consumers in which the logits of these samples have no gradient, or one that is zero."""
    gated = GatedPass(model, groups, samples, Reach(lifted))
    return frozenset(consumer.call for consumer, found in gated.reached() if not found)


def matters(model: nn.Module, groups: ChannelGroups, parts: Sequence[torch.Tensor], call: int) -> bool:
    """Whether the logits depend on the groups' channels that a consumer reads."""
    consumer = next(one for one in groups.consumers if one.call == call)
    channels = {call: torch.from_numpy(np.flatnonzero(consumer.groups != KEPT))}
    return any(
        not torch.equal(*(logits_without(model, groups, part, removed) for removed in ({}, channels))) for part in parts
    )


def unreached_weights(
    model: nn.Module, weights: Mapping[str, nn.Parameter], samples: torch.Tensor, lifted: bool
) -> list[str]:
    """Names of the parameters in which the logits have no gradient, or one that is zero, although they change when the
    parameter is zero. Every parameter needs a gradient while this runs.

    Args: samples: (n, ...) on the model's device. lifted: whether the network's stops are.
    """
    with LiftedStops() if lifted else nullcontext():
        logits = class_rows(model(samples), len(samples))
    output = (logits * torch.arange(1, logits.shape[1] + 1, device=logits.device)).sum()
    found = torch.autograd.grad(output, list(weights.values()), allow_unused=True)
    silent = [name for name, dw in zip(weights, found, strict=True) if dw is None or not dw.any()]
    with torch.no_grad():
        whole = class_rows(model(samples), len(samples))
    return [name for name in silent if not torch.equal(logits_with_zero(model, weights[name], samples), whole)]


@torch.no_grad()
def logits_with_zero(model: nn.Module, weight: nn.Parameter, samples: torch.Tensor) -> torch.Tensor:
    """Logits (b, classes) of a model one parameter of which is zero; then it is as it was."""
    kept = weight.detach().clone()
    try:
        weight.zero_()
        return class_rows(model(samples), len(samples))
    finally:
        weight.copy_(kept)
