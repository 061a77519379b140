"""Layer-adaptive magnitude: a group's squared norm, divided by those of all groups of its family not below it."""

import numpy as np

from cahfp_cli.significance.registry import Evidence, criterion, group_sums
from cahfp_cli.significance.statistics import Floats


@criterion("lamp", needs="weights")
def lamp(evidence: Evidence) -> Floats:
    """Layer-adaptive magnitude (Lee et al. 2021) of groups: m_c / sum of m_u over the groups u of the same family with
    m_u >= m_c, m the squared Euclidean norm of a group's weights. Of equal ones the lower number counts as smaller.

    Returns: Float64 (groups,), 0..1, without a unit; 1 for the largest of each family.
    """
    squares = group_sums(evidence, np.square)
    scores = np.zeros_like(squares)
    for number in np.unique(evidence.groups.family):
        members = np.flatnonzero(evidence.groups.family == number)
        ascending = members[np.argsort(squares[members], kind="stable")]
        not_below = np.cumsum(squares[ascending][::-1])[::-1]
        nonzero = not_below > 0
        scores[ascending[nonzero]] = squares[ascending[nonzero]] / not_below[nonzero]
    return scores
