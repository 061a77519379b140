"""Half the empirical Fisher diagonal in gate space, 1/2 E[(dL/dz)^2] with the true labels."""

from cahfp_cli.significance.registry import Evidence, criterion, gates_of
from cahfp_cli.significance.statistics import Floats


@criterion("gate-fisher", needs="gates")
def gate_fisher(evidence: Evidence) -> Floats:
    """Half the empirical Fisher diagonal in gate space, 1/2 E[(dL/dz)^2] with the true labels.

    Returns: Float64 (groups,), >= 0, nats. One backward pass cheaper than the Gauss-Newton diagonal, and biased.
    """
    return 0.5 * gates_of(evidence).gradient_square
