"""One file for each family of operators; importing this package fills the registry."""

from cahfp_cli.coupling.rules import (
    convolution,
    creation,
    indexing,
    matmul,
    normalisation,
    pointwise,
    pooling,
    recurrent,
    reduction,
    reshape,
)

__all__ = [
    "convolution",
    "creation",
    "indexing",
    "matmul",
    "normalisation",
    "pointwise",
    "pooling",
    "recurrent",
    "reduction",
    "reshape",
]
