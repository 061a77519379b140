"""One batch through a network and back, with errors that say why it cannot be classified or differentiated."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cahfp_cli.data.dataset import Samples
from cahfp_cli.errors import InputError, first_line
from cahfp_cli.models.outputs import class_rows, run_network


def class_logits(model: nn.Module, x: Samples, classes: int, device: torch.device, least: int = 2) -> torch.Tensor:
    """Logits (n, outputs) on `device` for samples (n, ...), float32 or wider, with outputs >= `classes` and >= `least`.

    Raises: InputError: the network refuses the samples, or its output is not one row of logits a sample.
    """
    return class_rows(run_network(model, torch.from_numpy(x).to(device)), len(x), classes, least)


@contextmanager
def backward() -> Iterator[None]:
    """A backward pass takes place inside. Raises: InputError: autograd fails on the network."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error
    except RuntimeError as error:
        raise InputError(
            f"gradients do not go through the model: {first_line(error)}\nIts code keeps them from all parameters "
            "(no_grad, detach), or has an operator without a derivative; change that to train it."
        ) from error
