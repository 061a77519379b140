"""First-order Taylor expansion in the gate with its sign, -dL/dz."""

from cahfp_cli.significance.registry import Evidence, criterion, gates_of
from cahfp_cli.significance.statistics import Floats


@criterion("gate-taylor-signed", needs="gates", signed=True)
def gate_taylor_signed(evidence: Evidence) -> Floats:
    """First-order prediction of the change of the loss, -dL/dz (Molchanov et al. 2017, before the absolute value).

    Returns: Float64 (groups,), nats; negative where the loss is predicted to fall when the group goes.
    """
    return -gates_of(evidence).gradient
