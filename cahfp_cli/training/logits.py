"""One batch through a network, with errors that say why it cannot be classified."""

import torch
from torch import nn

from cahfp_cli.data.dataset import Samples
from cahfp_cli.errors import InputError, first_line
from cahfp_cli.models.outputs import logits_of


def class_logits(model: nn.Module, x: Samples, classes: int, device: torch.device) -> torch.Tensor:
    """Logits (n, outputs) on `device` for samples (n, ...), with outputs >= `classes`.

    Raises: InputError: the network refuses the samples, or its output is not one row of logits a sample.
    """
    batch = torch.from_numpy(x).to(device)
    try:
        output = model(batch)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise MemoryError(str(error)) from error
        shape = "x".join(map(str, x.shape[1:]))
        raise InputError(
            f"the model fails on a batch of {len(x)} samples of {shape}: {first_line(error)}\n"
            "Check that the data is what the model was made for, and that the batch is not too small."
        ) from error
    logits = logits_of(output)
    if logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < classes:
        raise InputError(
            f"the model returned {tuple(logits.shape)} for {len(x)} samples of {classes} classes: "
            "it must return one row of logits a sample."
        )
    return logits
