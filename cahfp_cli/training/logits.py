"""One batch through a network, with errors that say why it cannot be classified."""

import torch
from torch import nn

from cahfp_cli.data.dataset import Samples
from cahfp_cli.models.outputs import class_rows, run_network


def class_logits(model: nn.Module, x: Samples, classes: int, device: torch.device) -> torch.Tensor:
    """Logits (n, outputs) on `device` for samples (n, ...), float32 or wider, with outputs >= `classes`.

    Raises: InputError: the network refuses the samples, or its output is not one row of logits a sample.
    """
    return class_rows(run_network(model, torch.from_numpy(x).to(device)), len(x), classes)
