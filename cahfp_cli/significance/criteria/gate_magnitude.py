"""Mean absolute gradient of single samples in the gate, E_b |dL_b/dz|."""

from cahfp_cli.significance.registry import Evidence, criterion, gates_of
from cahfp_cli.significance.statistics import Floats


@criterion("gate-magnitude", needs="gates")
def gate_magnitude(evidence: Evidence) -> Floats:
    """Mean absolute gradient of single samples in the gate, E_b |dL_b/dz| (Molchanov et al. 2017, who also take the
    absolute value of each sample: those that pull in opposite directions do not cancel).

    Returns: Float64 (groups,), >= 0, nats; at least `gate-taylor`.
    """
    return gates_of(evidence).gradient_magnitude
