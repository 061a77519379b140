"""Elementwise operators of any number of tensors: unite, element by element, what broadcasting lines up."""

from collections.abc import Sequence

import torch

from cahfp_cli.coupling.atoms import Atoms, fixed
from cahfp_cli.coupling.registry import Axes, Call, Couplings, Result, rule

UNTAGGED = frozenset(
    {"hardswish", "hardswish_", "relu6", "copy", "copy_", "_to_copy", "clone", "detach", "detach_", "alias", "lift"}
    | {"lift_fresh", "lift_fresh_copy", "native_dropout", "bernoulli", "bernoulli_", "fill_", "zero_", "contiguous"}
    | {"masked_fill", "masked_fill_", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
    | {
        "dropout",
        "dropout_",
        "uniform_",
        "normal_",
        "log_sigmoid_forward",
        "silu",
        "gelu",
        "mish",
        "glu_jvp",
        "_prelu_kernel",
    }
)
"""Elementwise operators that lack torch's `pointwise` tag in some release we support."""


def is_pointwise(op: torch._ops.OpOverload) -> bool:
    """Whether an operator works element by element."""
    return torch.Tag.pointwise in op.tags or op.overloadpacket.__name__ in UNTAGGED


def broadcast(atoms: Atoms, operands: Sequence[Axes], shape: tuple[int, ...]) -> Axes:
    """Unite the operands' axes as broadcasting lines them up, from the right; returns the result's axes."""
    result = []
    for back in range(len(shape), 0, -1):
        length = shape[-back]
        united = None
        for axes in operands:
            if len(axes) < back:
                continue
            labels = axes[-back]
            if len(labels) != length:
                atoms.pin(labels, "an axis of length 1 that is broadcast")
            elif united is None:
                united = labels
            else:
                atoms.tie(united, labels)
        result.append(fixed(length) if united is None else united)
    return tuple(result)


def pointwise(couplings: Couplings, call: Call) -> Result:
    """Any elementwise operator; every output has the shape that the operands broadcast to."""
    tensors = [value for value in call.arguments.values() if isinstance(value, torch.Tensor)]
    outputs = [call.output] if isinstance(call.output, torch.Tensor) else list(call.output)
    shape = tuple(outputs[0].shape)
    axes = broadcast(couplings.atoms, [call.axes_of(t) for t in tensors], shape)
    return axes if isinstance(call.output, torch.Tensor) else [axes for _ in outputs]


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp")
@rule("flip", "roll", "sort", "topk", "tril", "triu", "_fft_r2c", "_fft_c2c", "_fft_c2r")
def along_some_axes(couplings: Couplings, call: Call) -> Result:
    """Elementwise but for some axes along which entries mix or move: those cannot lose entries."""
    name, x = call.op.overloadpacket.__name__, call.axes("self")
    dims = (-2, -1) if name in ("tril", "triu") else call.arguments.get("dim", call.arguments.get("dims"))
    listed = [dims] if isinstance(dims, int) else dims or range(len(x))  # an empty list means all axes
    along = {d % len(x) for d in listed}
    for axis in along:
        couplings.atoms.pin(x[axis], f"{name} along the axis")

    def carried(output: torch.Tensor) -> Axes:
        return tuple(fixed(output.shape[i]) if i in along else labels for i, labels in enumerate(x))

    return carried(call.output) if isinstance(call.output, torch.Tensor) else [carried(out) for out in call.output]
