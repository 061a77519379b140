"""Statistics of batch norms measured anew: those of a pruned network are not those of the full one."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.errors import InputError
from cahfp_cli.models.tensors import load_state

BATCH_NORMS = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def recalibrate(model: nn.Module, x: NDArray[Any], batch_size: int) -> int:
    """Replace the running statistics of every batch norm by the mean of those of the batches of `x`, in place.

    Everything but the batch norms stays in evaluation mode; weights do not change, and neither does the count of
    training batches. A batch norm that does not run then,
    as in a head that only training has, keeps its statistics.

    Args: x: samples, (n, ...), of which a last batch of one is left out.
    Returns: the number of batch norms measured, 0 for a network without any.
    Raises: InputError: statistics are not finite, or there is only one sample.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS) and module.track_running_stats]
    if not norms:
        return 0
    if len(x) < 2:
        raise InputError("statistics of batch norms cannot be measured on one sample")
    momenta = [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    samples = torch.from_numpy(x).to(next(model.parameters()).device)
    try:
        for batch in torch.split(samples, batch_size):
            if len(batch) > 1:
                model(batch)
    finally:
        model.eval()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    measured = 0
    for norm, statistics in zip(norms, before, strict=True):
        if norm.num_batches_tracked == 0:
            load_state(norm, statistics)
            continue
        measured += 1
        load_state(norm, {"num_batches_tracked": statistics["num_batches_tracked"]})
        if not all(bool(torch.isfinite(buffer).all()) for buffer in norm.buffers()):
            raise InputError("statistics of a batch norm are NaN or Inf on the calibration data")
    return measured
