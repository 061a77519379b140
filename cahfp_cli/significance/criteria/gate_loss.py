"""The whole second-order expansion in the gate, 1/2 G_cc - g, with the gradient g shrunk by the noise in it."""

import numpy as np

from cahfp_cli.significance.registry import Evidence, criterion, gates_of
from cahfp_cli.significance.statistics import Floats


@criterion("gate-loss", needs="gates", signed=True)
def gate_loss(evidence: Evidence) -> Floats:
    """Second-order prediction of the change of the loss, 1/2 G_cc - sign(g) max(|g| - shrink error(g), 0), g = dL/dz
    (LeCun et al. 1990 without the assumption that g is zero; soft thresholding by standard errors, Donoho 1995).

    For networks that are not stationary on the data, such as a global model on one client's. Where they are, g is
    noise of the calibration sample, and `gate-ggn` leaves it out.

    Returns: Float64 (groups,), nats; negative where the loss is predicted to fall when the group goes.
    """
    gates = gates_of(evidence)
    size = np.maximum(np.abs(gates.gradient) - evidence.shrink * gates.gradient_error, 0.0)
    return 0.5 * gates.curvature - np.copysign(size, gates.gradient)
