"""Uniform noise, the baseline that every criterion must beat."""

import numpy as np

from cahfp_cli.significance.registry import Evidence, criterion
from cahfp_cli.significance.statistics import Floats


@criterion("random", needs="weights")
def random(evidence: Evidence) -> Floats:
    """Uniform noise, the baseline that every criterion must beat.

    Returns: Float64 (groups,), in [0, 1), the same for the same seed.
    """
    return np.random.default_rng(evidence.seed).random(evidence.groups.count)
