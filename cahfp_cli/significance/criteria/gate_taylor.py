"""First-order Taylor expansion in the gate, |dL/dz|."""

import numpy as np

from cahfp_cli.significance.registry import Evidence, criterion, gates_of
from cahfp_cli.significance.statistics import Floats


@criterion("gate-taylor", needs="gates")
def gate_taylor(evidence: Evidence) -> Floats:
    """First-order Taylor expansion in the gate, |dL/dz| (Molchanov et al. 2019, summed over a channel group).

    Returns: Float64 (groups,), >= 0, nats.
    """
    return np.abs(gates_of(evidence).gradient)
