"""Sum of the absolute weights of the group."""

import numpy as np

from cahfp_cli.significance.registry import Evidence, criterion, group_sums
from cahfp_cli.significance.statistics import Floats


@criterion("l1", needs="weights")
def l1(evidence: Evidence) -> Floats:
    """Sum of the absolute weights of the group (Li et al. 2017).

    Returns: Float64 (groups,), >= 0, in units of the weights.
    """
    return group_sums(evidence, np.abs)
