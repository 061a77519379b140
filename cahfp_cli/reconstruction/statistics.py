"""Batch-norm statistics are pooled as statistics: the result is mean and variance of all clients' samples together.

    mean = sum p_k mu_k        var = sum p_k var_k + sum p_k (mu_k - mean)^2

with the p_k of the aggregation rule; where the previous value counts, the global checkpoint's own statistics take part
as one more client's. This form of the variance cannot become negative, unlike sum p (var + mu^2) - mean^2.
"""

from collections.abc import Sequence

import numpy as np

from cahfp_cli.checkpoint.dtypes import FLOATS
from cahfp_cli.checkpoint.safetensors_file import SafetensorsFile
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.errors import InputError
from cahfp_cli.pruning.index_map import Indices
from cahfp_cli.reconstruction.blocks import Block, Part, merge_floats
from cahfp_cli.reconstruction.clients import Client
from cahfp_cli.reconstruction.rules import Floats, Rule

MEAN, VARIANCE = "running_mean", "running_var"


def mean_of(variance: str, checkpoint: SafetensorsFile) -> str | None:
    """The name of the running mean that belongs to the tensor `variance`, or None if it is no running variance."""
    prefix, dot, last = variance.rpartition(".")
    mean = f"{prefix}{dot}{MEAN}"
    if last != VARIANCE or mean not in checkpoint.tensors:
        return None
    of_mean, of_variance = checkpoint.tensors[mean], checkpoint.tensors[variance]
    both_float = of_mean.dtype in FLOATS and of_variance.dtype in FLOATS
    return mean if both_float and of_mean.shape == of_variance.shape else None


def check_pairs(checkpoint: SafetensorsFile, clients: Sequence[Client]) -> None:
    """Raises: InputError: a client's map keeps other channels of a running mean than of its running variance."""
    for name in checkpoint.tensors:
        mean = mean_of(name, checkpoint)
        if mean is None:
            continue
        for client in clients:
            of_mean, of_variance = (client.index_map.tensors[tensor].axes for tensor in (mean, name))
            if not all(map(_same_indices, of_mean, of_variance)):
                raise InputError(
                    f"{client.folder}: its index map keeps other channels of {shown(mean)} than of {shown(name)}; "
                    "it is damaged: prune again."
                )


def merge_variance(
    block: Block, mean: str, checkpoint: SafetensorsFile, clients: Sequence[Client], rule: Rule
) -> Floats:
    """Merge one block of a running variance, whose running mean is the tensor `mean`; float64, of the block's shape."""
    rows = (block.first, block.last)
    means = Block(mean, block.shape, *rows)
    previous_mean = checkpoint.read_rows(mean, *rows).astype(np.float64)
    previous = checkpoint.read_rows(block.name, *rows).astype(np.float64)
    pooled = merge_floats(means, previous_mean, lambda part: part.read(mean).astype(np.float64), clients, rule)

    def about_pooled_mean(part: Part) -> Floats:
        distance = part.read(mean).astype(np.float64) - pooled[part.places]
        return _about(part.read(block.name).astype(np.float64), distance)

    return merge_floats(block, _about(previous, previous_mean - pooled), about_pooled_mean, clients, rule)


def _about(variance: Floats, distance: Floats) -> Floats:
    """Second moment about a point at `distance` from the mean; at distance 0 every bit of the variance is kept."""
    return np.where(distance == 0, variance, variance + distance**2)


def _same_indices(left: Indices | None, right: Indices | None) -> bool:
    if left is None or right is None:
        return left is right
    return np.array_equal(left, right)
