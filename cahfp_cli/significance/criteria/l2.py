"""Euclidean norm of the weights of the group."""

import numpy as np

from cahfp_cli.significance.registry import Evidence, criterion, group_sums
from cahfp_cli.significance.statistics import Floats


@criterion("l2", needs="weights")
def l2(evidence: Evidence) -> Floats:
    """Euclidean norm of the weights of the group (group magnitude; Fang et al. 2023).

    Returns: Float64 (groups,), >= 0, in units of the weights.
    """
    return np.sqrt(group_sums(evidence, np.square))
