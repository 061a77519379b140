"""Diagonal empirical Fisher of the single weights, summed over the group: 1/2 sum_w w^2 E_b[(dL_b/dw)^2]."""

import torch

from cahfp_cli.significance.registry import (
    Evidence,
    calibration_losses,
    criterion,
    differentiable,
    parameters_in_groups,
    second_order_sums,
)
from cahfp_cli.significance.statistics import Floats


@criterion("weight-fisher", needs="samples")
def weight_fisher(evidence: Evidence) -> Floats:
    """Diagonal empirical Fisher of the single weights, 1/2 sum_w w^2 E_b[(dL_b/dw)^2] (Theis et al. 2018: Optimal
    Brain Damage with the Fisher for the Hessian), over every parameter of the group, biases and norms included.

    How the weights of a group act together is left out, unlike in `gate-fisher`. One backward pass a sample.

    Returns: Float64 (groups,), >= 0, nats.
    Raises: InputError: a calibration sample gives a non-finite loss (its number is named).
    """
    parameters = parameters_in_groups(evidence)
    weights = list(parameters.values())
    squares = [torch.zeros(weight.shape, dtype=torch.float64) for weight in weights]
    samples = 0
    with differentiable(weights):
        for loss in calibration_losses(evidence, batch_size=1):
            gradients = torch.autograd.grad(loss.sum(), weights, materialize_grads=True)
            for square, gradient in zip(squares, gradients, strict=True):
                square += gradient.cpu().double().square()
            samples += 1
    return second_order_sums(evidence, {n: square / samples for n, square in zip(parameters, squares, strict=True)})
