"""Batch-norm statistics are pooled as statistics: the result is mean and variance of all clients' samples together.

    mean = sum p_k mu_k        var = sum p_k var_k + sum p_k (mu_k - mean)^2

with the p_k of the aggregation rule; where the previous value counts, the global checkpoint's own statistics take part
as one more client's. This form of the variance cannot become negative, unlike sum p (var + mu^2) - mean^2. Robust rules
do not pool: they take each number by itself.
"""

from collections.abc import Sequence

import numpy as np

from cahfp_cli.checkpoint.sharded import Tensors
from cahfp_cli.reconstruction.average import merge_floats
from cahfp_cli.reconstruction.blocks import Block, Holders, Part
from cahfp_cli.reconstruction.clients import Client
from cahfp_cli.reconstruction.rules import Floats, Rule
from cahfp_cli.reconstruction.updates import brought


def merge_variance(
    block: Block, mean: str, checkpoint: Tensors, clients: Sequence[Client], holders: Holders, rule: Rule
) -> Floats:
    """Merge one block of a running variance, whose running mean is the tensor `mean`; float64, of the block's shape."""
    rows = (block.first, block.last)
    means = Block(mean, block.shape, *rows)
    previous_mean = checkpoint.read_rows(mean, *rows).astype(np.float64)
    previous = checkpoint.read_rows(block.name, *rows).astype(np.float64)

    def own_mean(part: Part) -> Floats:
        return brought(part, mean, previous_mean, checkpoint.path).astype(np.float64)

    pooled = merge_floats(means, previous_mean, own_mean, clients, holders, rule)

    def about_pooled_mean(part: Part) -> Floats:
        own = brought(part, block.name, previous, checkpoint.path).astype(np.float64)
        return _about(own, own_mean(part) - pooled[part.places])

    return merge_floats(block, _about(previous, previous_mean - pooled), about_pooled_mean, clients, holders, rule)


def _about(variance: Floats, distance: Floats) -> Floats:
    """Second moment about a point at `distance` from the mean; at distance 0 every bit of the variance is kept."""
    return np.where(distance == 0, variance, variance + distance**2)
