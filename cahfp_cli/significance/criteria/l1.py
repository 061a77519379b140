"""Sum of the absolute weights of the group."""

import numpy as np

from cahfp_cli.significance.gates import Floats
from cahfp_cli.significance.registry import Evidence, criterion, group_sums


@criterion("l1", needs_gates=False)
def l1(evidence: Evidence) -> Floats:
    """Sum of the absolute weights of the group (Li et al. 2017).

    Returns: Float64 (groups,), >= 0, in units of the weights.
    """
    return group_sums(evidence, np.abs)
