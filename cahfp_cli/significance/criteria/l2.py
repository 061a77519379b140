"""Euclidean norm of the weights of the group."""

import numpy as np

from cahfp_cli.significance.gates import Floats
from cahfp_cli.significance.registry import Evidence, criterion, group_sums


@criterion("l2", needs_gates=False)
def l2(evidence: Evidence) -> Floats:
    """Euclidean norm of the weights of the group (group magnitude; Fang et al. 2023).

    Returns: Float64 (groups,), >= 0, in units of the weights.
    """
    return np.sqrt(group_sums(evidence, np.square))
