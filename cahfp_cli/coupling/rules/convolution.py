"""Convolutions: dense, grouped, depthwise, transposed."""

import numpy as np

from cahfp_cli.coupling.atoms import Labels, fixed, varies
from cahfp_cli.coupling.registry import Axes, Call, Couplings, rule
from cahfp_cli.coupling.slicing import removes_whole_groups


@rule("convolution")
def convolution(couplings: Couplings, call: Call) -> Axes:
    """Ties x's channels to weight axis 1 and the output's channels to weight axis 0 (axes swapped if transposed)."""
    x, weight, bias = call.axes("input"), call.axes("weight"), call.optional_axes("bias")
    groups, transposed = call["groups"], call["transposed"]
    per_group, own = (0, 1) if transposed else (1, 0)  # transposed weights are (in, out / groups, ...)
    atoms = couplings.atoms
    parameter = call.parameter_of(call["weight"])
    channels_in = x[1]
    for kernel_axis in weight[2:]:
        atoms.pin(kernel_axis, "kernel of a convolution")
    out_axis = weight[1] if transposed else weight[0]
    contracted = False
    if groups == 1:
        in_axis = weight[0] if transposed else weight[1]
        atoms.tie(channels_in, in_axis)
        contracted = True
    elif transposed:
        # A transposed weight holds every input channel but only one group's outputs: tie all of it down.
        for axis in (channels_in, weight[0], weight[1]):
            atoms.pin(axis, "grouped transposed convolution")
        out_axis = fixed(call.output.shape[1])
    elif removes_whole_groups(groups, len(weight[1])):
        atoms.pin(weight[1], "inputs inside a group of a grouped convolution that loses whole groups")
        by_group_in, by_group_out = channels_in.reshape(groups, -1), weight[own].reshape(groups, -1)
        atoms.tie(by_group_in.reshape(-1), np.repeat(by_group_in[:, 0], by_group_in.shape[1]))
        atoms.tie(by_group_out.reshape(-1), np.repeat(by_group_in[:, 0], by_group_out.shape[1]))
    else:
        atoms.tie(channels_in, np.tile(weight[1], groups))
        positions = weight[own].reshape(groups, -1)
        atoms.tie(weight[own], np.tile(positions[0], groups))
        contracted = True
    if contracted:
        couplings.consume(channels_in, parameter, per_group)
    if bias is not None:
        atoms.tie(bias[0], out_axis)
    return (x[0], out_axis, *(space_of(couplings, call, i) for i in range(len(x) - 2)))


def space_of(couplings: Couplings, call: Call, i: int) -> Labels:
    """Axis i of space: it passes where it keeps its length; masking is the same where an output reads one place."""
    labels, kernel = call.axes("input")[2 + i], call["weight"].shape[2 + i]
    if varies(labels) and call["stride"][i] == 1 and call.output.shape[2 + i] == len(labels) and kernel > 1:
        couplings.atoms.remark(labels, "convolution along the axis")  # as channel attention does
        return labels
    if kernel == 1 and (call["stride"][i], call["padding"][i], call["output_padding"][i]) == (1, 0, 0):
        return labels
    couplings.atoms.pin(labels, "an axis that a convolution mixes")
    return fixed(call.output.shape[2 + i])
