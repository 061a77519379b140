"""A batch through a network to one row of logits a sample, and back, with errors that say why that cannot be."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cahfp_cli.data.dataset import Samples
from cahfp_cli.errors import CahfpError, InputError, first_line
from cahfp_cli.models.outputs import logits_of
from cahfp_cli.running.rows import check_rows


def class_logits(model: nn.Module, x: Samples, classes: int, device: torch.device, least: int = 2) -> torch.Tensor:
    """Logits (n, outputs) on `device` for samples (n, ...), float32 or wider, with outputs >= `classes` and >= `least`.

    Raises: InputError: the network refuses the samples, or its output is not one row of logits a sample.
    """
    return class_rows(run_network(model, torch.from_numpy(x).to(device)), len(x), classes, least)


def class_rows(output: object, samples: int, classes: int = 2, least: int = 2) -> torch.Tensor:
    """Logits (samples, outputs) of a network's output, float32 or wider, with outputs >= `classes` and >= `least`.

    Raises: InputError: there are none, or not one row of so many real numbers a sample.
    """
    logits = logits_of(output)
    check_rows(tuple(logits.shape), samples, classes, "the model returned", least)
    if not logits.is_floating_point():
        raise InputError(f"the model returned {logits.dtype} (classes already chosen?): it must return logits.")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def run_network(model: nn.Module, batch: torch.Tensor) -> object:
    """What a network returns for a batch. Raises: InputError: its code fails on it."""
    try:
        return model(batch)
    except (CahfpError, MemoryError):
        raise
    except Exception as error:  # whatever the user's own forward raises
        if isinstance(error, torch.OutOfMemoryError):
            raise MemoryError(str(error)) from error
        shape = "x".join(map(str, batch.shape[1:]))
        raise InputError(
            f"the model fails on a batch of {len(batch)} samples of {shape}: {first_line(error)}\n"
            "Check that the data is what the model was made for, and that the batch is not too small."
        ) from error


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
