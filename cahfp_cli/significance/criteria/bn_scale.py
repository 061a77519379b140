"""Sum of the absolute scales that normalisation layers give to the group, |gamma|."""

import numpy as np
from torch import nn

from cahfp_cli.errors import InputError
from cahfp_cli.models.checkpoint_io import some
from cahfp_cli.significance.registry import Evidence, criterion, parameters_in_groups, sums_by_group
from cahfp_cli.significance.statistics import Floats

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


@criterion("bn-scale", needs="weights")
def bn_scale(evidence: Evidence) -> Floats:
    """Sum of |gamma| over the group's entries in normalisation layers' scales (network slimming, Liu et al. 2017).

    Returns: Float64 (groups,), >= 0, without a unit.
    Raises: InputError: no norm scales the groups of some family (which is named).
    """
    scales = {id(module.weight) for module in evidence.model.modules() if isinstance(module, NORMS)}
    gammas = {
        name: np.abs(np.asarray(evidence.weights[name], dtype=np.float64))
        for name, parameter in parameters_in_groups(evidence).items()
        if id(parameter) in scales
    }
    entries = sums_by_group(evidence.groups, ((name, np.ones_like(gamma)) for name, gamma in gammas.items()))
    bare = [evidence.groups.names[number] for number in np.unique(evidence.groups.family[entries == 0])]
    if bare:
        raise InputError(
            f"bn-scale: no normalisation layer scales the channels of {some(bare)}. "
            "Choose another criterion, such as l2 or gate-ggn."
        )
    return sums_by_group(evidence.groups, gammas.items())
