"""First-order Taylor expansion in the gate, |dL/dz|."""

import numpy as np

from cahfp_cli.significance.gates import Floats
from cahfp_cli.significance.registry import Evidence, criterion, gates_of


@criterion("gate-taylor", needs_gates=True)
def gate_taylor(evidence: Evidence) -> Floats:
    """First-order Taylor expansion in the gate, |dL/dz| (Molchanov et al. 2019, summed over a channel group).

    Returns: Float64 (groups,), >= 0, nats.
    """
    return np.abs(gates_of(evidence).gradient)
