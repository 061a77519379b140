"""Half the gate-space Gauss-Newton diagonal."""

from cahfp_cli.significance.registry import Evidence, criterion, gates_of
from cahfp_cli.significance.statistics import Floats


@criterion("gate-ggn", needs="gates")
def gate_ggn(evidence: Evidence) -> Floats:
    """Half the gate-space Gauss-Newton diagonal, 1/2 E[J' (diag p - p p') J] (Schraudolph 2002).

    Returns: predicted increase of the mean loss, in nats, of removing each group alone, float64 (groups,), >= 0. The
    gradient term is left out: at a trained network it is calibration noise.
    """
    return 0.5 * gates_of(evidence).curvature
