"""Matrix products: contracted axes are tied, outer axes carried."""

from cahfp_cli.coupling.registry import Axes, Call, Couplings, rule
from cahfp_cli.coupling.rules.pointwise import broadcast


def contract(couplings: Couplings, call: Call, left: str, right: str) -> Axes:
    """(..., n, k) @ (..., k, m): ties k with k and batch with batch; notes which weight matrix contracts."""
    a, b = call.axes(left), call.axes(right)
    couplings.atoms.tie(a[-1], b[-2])
    for batch_a, batch_b in zip(a[:-2], b[:-2], strict=True):
        couplings.atoms.tie(batch_a, batch_b)
    parameter = call.parameter_of(call[right])
    couplings.consume(a[-1], parameter if parameter is not None and len(parameter.dims) == 2 else None, -2)
    return (*a[:-1], b[-1])


@rule("mm", "bmm")
def product(couplings: Couplings, call: Call) -> Axes:
    """Matrix product of two matrices, or of two batches of them."""
    return contract(couplings, call, "self", "mat2")


@rule("addmm", "baddbmm")
def product_plus_bias(couplings: Couplings, call: Call) -> Axes:
    """As a product, with a bias that is added by broadcasting."""
    matrices = ("mat1", "mat2") if "mat1" in call.arguments else ("batch1", "batch2")
    out = contract(couplings, call, *matrices)
    return broadcast(couplings.atoms, [out, call.axes("self")], tuple(call.output.shape))
