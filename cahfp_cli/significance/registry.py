"""The registry of criteria: what was measured becomes one number a channel group, larger is worth more."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.coupling.groups import KEPT, ChannelGroups
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.errors import CahfpError, InputError, UsageError
from cahfp_cli.models.checkpoint_io import some
from cahfp_cli.running.logits import class_rows, run_network
from cahfp_cli.significance.consumers import LiftedStops
from cahfp_cli.significance.gates import batches_of, check_labels
from cahfp_cli.significance.reach import PROBES, unreached_weights
from cahfp_cli.significance.statistics import Floats, GateStatistics

Needs = Literal["weights", "samples", "gates"]
"""What a criterion looks at: the weights alone, the network on calibration samples, or gate statistics of those."""

SHRINK = 1.0
OTHERWISE = "choose a criterion that measures without them (gate-ggn, gate-loss) or none at all (l2)."


@dataclass(frozen=True)
class Evidence:
    """What criteria may look at.

    model: the network, in evaluation mode; groups: its channel groups; weights: every tensor of the checkpoint by
    name; calibration: None for a criterion that needs only weights; gates: None unless it needs them; seed: for
    criteria that draw; shrink: standard errors by which `gate-loss` shrinks the gradient.
    """

    model: nn.Module
    groups: ChannelGroups
    weights: Mapping[str, NDArray[Any]]
    calibration: Dataset | None
    gates: GateStatistics | None
    seed: int
    shrink: float = SHRINK


@dataclass(frozen=True)
class Criterion:
    """A named function of the evidence. signed: whether a group may be worth less than nothing."""

    name: str
    needs: Needs
    signed: bool
    function: Callable[[Evidence], Floats]


CRITERIA: dict[str, Criterion] = {}


def criterion(
    name: str, *, needs: Needs, signed: bool = False
) -> Callable[[Callable[[Evidence], Floats]], Callable[[Evidence], Floats]]:
    """Register a criterion under its name on the command line."""

    def register(function: Callable[[Evidence], Floats]) -> Callable[[Evidence], Floats]:
        CRITERIA[name] = Criterion(name, needs, signed, function)
        return function

    return register


def find_criterion(name: str) -> Criterion:
    """The criterion of that name. Raises UsageError with the names there are."""
    from cahfp_cli.significance import criteria

    assert criteria.__all__  # importing the package fills the registry
    if name not in CRITERIA:
        raise UsageError(f"there is no criterion {name!r}: choose one of {', '.join(sorted(CRITERIA))}")
    return CRITERIA[name]


def gates_of(evidence: Evidence) -> GateStatistics:
    """The gate statistics that a criterion asked for."""
    if evidence.gates is None:
        raise ValueError("this criterion needs gate statistics")
    return evidence.gates


def calibration_of(evidence: Evidence) -> Dataset:
    """The samples that a criterion asked for."""
    if evidence.calibration is None:
        raise ValueError("this criterion needs calibration samples")
    return evidence.calibration


def group_sums(evidence: Evidence, of: Callable[[NDArray[Any]], NDArray[Any]]) -> Floats:
    """Sum of `of(weight)` over each group's weights (matrices and kernels, not vectors), float64 (groups,).

    An element that belongs to two groups, by its input and by its output, counts for both; one of tied weights counts
    once, and buffers are no weights.
    """
    matrices = (name for name, parameter in parameters_in_groups(evidence).items() if parameter.dim() > 1)
    return sums_by_group(
        evidence.groups, ((name, of(np.asarray(evidence.weights[name], dtype=np.float64))) for name in matrices)
    )


def second_order_sums(evidence: Evidence, diagonal: Mapping[str, torch.Tensor]) -> Floats:
    """1/2 sum of w^2 h_w over each group, for second derivatives h of parameters by name, float64 on the CPU."""
    return sums_by_group(
        evidence.groups,
        (
            (name, 0.5 * np.square(np.asarray(evidence.weights[name], dtype=np.float64)) * second.numpy())
            for name, second in diagonal.items()
        ),
    )


def sums_by_group(groups: ChannelGroups, values: Iterable[tuple[str, NDArray[Any]]]) -> Floats:
    """Sum over each group of what its elements have in `values`, pairs of a tensor's name and an array of its shape.

    An element counts once for each of its axes that has a group: for both of two groups.
    """
    total = np.zeros(groups.count + 1)
    for name, array in values:
        for axis, labels in enumerate(groups.labels[name]):
            if (labels != KEPT).any():
                others = tuple(i for i in range(array.ndim) if i != axis)
                np.add.at(total, labels, array.sum(axis=others))
    return total[:-1]  # the last entry collected what is KEPT


def parameters_in_groups(evidence: Evidence) -> dict[str, nn.Parameter]:
    """The parameters of which some entry belongs to a group, by name; tied ones once, under their first name."""
    return {
        name: parameter
        for name, parameter in evidence.model.named_parameters()
        if any((labels != KEPT).any() for labels in evidence.groups.labels.get(name, ()))
    }


@contextmanager
def differentiable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While this lasts, autograd follows the parameters, also frozen ones."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def calibration_losses(evidence: Evidence, batch_size: int) -> Iterator[torch.Tensor]:
    """Cross-entropies of the calibration samples in order, in nats, a batch (b,) at a time with its graph.

    Raises: InputError: one is not finite (the sample's number is named), or gradients do not reach some weights.
    """
    calibration = calibration_of(evidence)
    device = next(evidence.model.parameters()).device
    lifted = check_reached(evidence, torch.from_numpy(calibration.x[:PROBES]).to(device))
    for first, samples in batches_of(calibration.x, batch_size, device):
        labels = torch.from_numpy(calibration.y[first : first + batch_size]).to(device)
        with LiftedStops() if lifted else nullcontext():
            logits = class_rows(evidence.model(samples), len(samples))
        check_labels(labels, logits)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        bad = torch.nonzero(~torch.isfinite(losses))
        if len(bad):
            raise InputError(
                f"calibration sample {first + int(bad[0])} gives a non-finite loss: check it and the weights"
            )
        yield losses


def check_reached(evidence: Evidence, samples: torch.Tensor) -> bool:
    """Whether the places where the network stops gradients can be lifted.

    Raises: InputError: the network does not run, or gradients do not reach weights that the logits depend on.
    """
    with torch.no_grad():  # whatever fails here is the network's
        class_rows(run_network(evidence.model, samples), len(samples))
    weights = parameters_in_groups(evidence)
    for lifted in (True, False):
        try:
            silent = unreached_weights(evidence.model, weights, samples, lifted)
        except CahfpError:
            raise
        except Exception:  # what the network does to tensors that have gradients, or an operator without a derivative
            continue
        if silent:
            raise InputError(f"gradients do not reach {some(silent)}: {OTHERWISE}")
        return lifted
    raise InputError(f"gradients do not go through this network: {OTHERWISE}")
