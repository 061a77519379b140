"""Normalisation layers."""

import numpy as np
import torch

from cahfp_cli.coupling.atoms import fixed
from cahfp_cli.coupling.registry import Axes, Call, Couplings, rule


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit_functional",
    "cudnn_batch_norm",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
)
def batch_norm(couplings: Couplings, call: Call) -> list[Axes | None]:
    """Ties scale, shift and running statistics to the channels; each channel is normalised on its own."""
    x = call.axes("input")
    for axis, labels in enumerate(x):
        if axis != 1:
            couplings.atoms.remark(labels, "normalisation over the axis")
    for name in ("weight", "bias", "running_mean", "running_var"):
        axes = call.optional_axes(name)
        if axes is not None:
            couplings.atoms.tie(x[1], axes[0])
    statistics = [(x[1],) if out.dim() == 1 and len(out) == len(x[1]) else None for out in call.output[1:]]
    return [x, *statistics]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(couplings: Couplings, call: Call) -> list[Axes | None] | Axes:
    """Normalises over the last axes: they may be pruned, but the statistics are then those of fewer entries."""
    x = call.axes("input")
    affected = x[len(x) - len(call["normalized_shape"]) :]
    for labels in affected:
        couplings.atoms.remark(labels, "layer normalisation over the axis")
    for name in ("weight", "bias"):
        axes = call.optional_axes(name)
        if axes is not None:
            for labels, own in zip(affected, axes, strict=True):
                couplings.atoms.tie(labels, own)
    if isinstance(call.output, torch.Tensor):
        return x
    statistics = (*x[: len(x) - len(affected)], *(fixed(1) for _ in affected))
    return [x, *(statistics if out.dim() == len(x) else None for out in call.output[1:])]


@rule("native_group_norm")
def group_norm(couplings: Couplings, call: Call) -> list[Axes | None]:
    """Ties the channels of a normalisation group to one another: whole groups go, the others keep their statistics."""
    x = call.axes("input")
    channels = x[1]
    groups = channels.reshape(call["group"], -1)
    couplings.atoms.tie(channels, np.repeat(groups[:, 0], groups.shape[1]))
    if call["group"] == 1:
        couplings.atoms.pin(channels, "group normalisation with a single group")
    if call["weight"] is None:
        couplings.atoms.pin(channels, "group normalisation without a scale, by which the number of groups could follow")
    for name in ("weight", "bias"):
        axes = call.optional_axes(name)
        if axes is not None:
            couplings.atoms.tie(channels, axes[0])
    return [x, *((x[0], groups[:, 0]) for _ in call.output[1:])]
