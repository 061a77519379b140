"""Tensors made from sizes: their axes are free until something ties them; the op-log check sees if sizes follow."""

from cahfp_cli.coupling.registry import Axes, Call, Couplings, Result, fixed_like, rule


@rule("zeros", "ones", "empty", "full", "eye", "rand", "randn", "scalar_tensor")
@rule("new_zeros", "new_ones", "new_empty", "new_full", "empty_strided", "new_empty_strided")
def create(couplings: Couplings, call: Call) -> Axes:
    """Every axis gets new atoms."""
    return tuple(couplings.atoms.fresh_for_size(n) for n in call.output.shape)


@rule("arange", "linspace", "logspace", "randperm", "tril_indices", "triu_indices")
def count(couplings: Couplings, call: Call) -> Result:
    """Entries that depend on their position: fixed, since a shorter one would hold other values."""
    return fixed_like(call.output)
