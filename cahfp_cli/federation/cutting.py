"""Submodels of the global network as a round needs them: thousands, of masks that repeat."""

import numpy as np
from torch import nn

from cahfp_cli.coupling.analysis import Analysis, cut
from cahfp_cli.coupling.slicing import slice_module
from cahfp_cli.federation.memory import Mask


def compact(network: nn.Module, analysis: Analysis, kept: Mask) -> nn.Module:
    """The compact network of the kept groups, in evaluation mode, with the values of `network`.

    Slices were proved when the network was analysed; one that needs rewrites is proved again, to find them.
    """
    if analysis.rewritten:
        return cut(network, analysis, kept)[0]
    return slice_module(network, analysis.groups.indices(np.asarray(kept))).eval()
