"""Optimal Brain Damage summed over the group, 1/2 sum_w w^2 h_w, with the Hessian's diagonal h by Hutchinson."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cahfp_cli.errors import InputError, first_line
from cahfp_cli.significance.registry import (
    Evidence,
    calibration_losses,
    criterion,
    differentiable,
    parameters_in_groups,
    second_order_sums,
)
from cahfp_cli.significance.statistics import Floats

PROBES = 8
BATCH = 32
"""Samples that share one graph of the loss and its gradient."""


@criterion("obd", needs="samples", signed=True)
def obd(evidence: Evidence) -> Floats:
    """Optimal Brain Damage, 1/2 sum_w w^2 h_w over every parameter of the group (LeCun et al. 1990), h = mean of
    v * (H v) over Rademacher probes v (Bekas et al. 2007), H the Hessian of the mean cross-entropy in these parameters.

    The entries of H off its diagonal are noise in h, much of it at 8 probes. Eight double backward passes a batch.

    Returns: Float64 (groups,), nats; may be negative, as H is indefinite. The same for the same seed.
    Raises: InputError: an operator has no second derivative, or a calibration sample gives a non-finite loss.
    """
    parameters = parameters_in_groups(evidence)
    weights = list(parameters.values())
    diagonal = [torch.zeros(weight.shape, dtype=torch.float64) for weight in weights]
    samples = 0
    with differentiable(weights), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        for losses in calibration_losses(evidence, BATCH):
            for terms in hutchinson(losses.sum(), weights, evidence.seed):
                for total, term in zip(diagonal, terms, strict=True):
                    total += term.cpu().double() / PROBES
            samples += len(losses)
    return second_order_sums(evidence, {n: total / samples for n, total in zip(parameters, diagonal, strict=True)})


def hutchinson(loss: torch.Tensor, weights: Sequence[torch.Tensor], seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """v * (H v) for each probe v, of the weights' shapes: H is the Hessian of `loss`, a scalar, in the weights."""
    try:
        gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        for probe in probes(weights, seed):
            products = torch.autograd.grad(gradients, weights, probe, retain_graph=True, materialize_grads=True)
            yield tuple(v * product for v, product in zip(probe, products, strict=True))
    except RuntimeError as error:
        raise InputError(
            f"obd cannot differentiate this network twice: {first_line(error)}\n"
            "Choose another criterion, such as weight-fisher."
        ) from error


def probes(weights: Sequence[torch.Tensor], seed: int) -> Iterator[list[torch.Tensor]]:
    """Random signs of the weights' shapes, the same on every device; drawn anew for each batch rather than stored."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(PROBES):
        yield [torch.randint(0, 2, weight.shape, generator=generator).to(weight) * 2 - 1 for weight in weights]
