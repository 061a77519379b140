"""Reductions: a reduced axis may lose entries, but the result is then that of fewer entries."""

import torch

from cahfp_cli.coupling.atoms import fixed
from cahfp_cli.coupling.registry import Axes, Call, Couplings, Result, rule


@rule("mean", "sum", "amax", "amin", "var", "std", "var_mean", "prod", "linalg_vector_norm", "logsumexp", "any", "all")
@rule("max", "min", "argmax", "argmin")
def reduce(couplings: Couplings, call: Call) -> Result:
    """Carries the axes that are not reduced. A maximum along one axis gives positions too, like argmax."""
    name = call.op.overloadpacket.__name__
    x = call.axes("self")
    if isinstance(call.arguments.get("other"), torch.Tensor):  # max(a, b) is elementwise
        from cahfp_cli.coupling.rules.pointwise import pointwise

        return pointwise(couplings, call)
    dims = call.arguments.get("dim")
    listed = [dims] if isinstance(dims, int) else dims or range(len(x))  # none or an empty list means all axes
    reduced = {d % len(x) for d in listed}
    for axis in reduced:
        if name in ("argmax", "argmin") or (name in ("max", "min") and not isinstance(call.output, torch.Tensor)):
            couplings.atoms.pin(x[axis], f"{name} over the axis")
        couplings.atoms.remark(x[axis], f"{name} over the axis")
    keep = call.arguments.get("keepdim", False)
    axes: Axes = tuple(fixed(1) if i in reduced else labels for i, labels in enumerate(x) if keep or i not in reduced)
    return axes if isinstance(call.output, torch.Tensor) else [axes for _ in call.output]
