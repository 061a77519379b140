"""Layers that find out their width in their first forward pass."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from cahfp_cli.errors import InputError


def complete_lazy_layers(model: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Run a model with lazy layers once, on a sample of zeros, so that they have their widths; it stays in its mode.

    Raises: InputError: a layer that the run does not reach, or no run on a sample of this shape.
    """
    if not lazy_names(model):
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    reason = "the forward pass does not reach it"
    for dtype in (torch.float32, torch.int64):  # features, tokens
        try:
            with torch.no_grad():
                model(torch.zeros(1, *input_shape, dtype=dtype))
            break
        except Exception as error:  # whatever the model's own code raises
            reason = f"the model does not run on a sample of {'x'.join(map(str, input_shape))} ({type(error).__name__})"
    for module, mode in modes.items():
        module.training = mode
    left = lazy_names(model)
    if left:
        raise InputError(
            f"the lazy layer {left[0].rpartition('.')[0]!r} has no width yet: {reason}.\n"
            "Check --input-shape, or give the layer its width in the model's code."
        )


def lazy_names(model: nn.Module) -> list[str]:
    """Parameters and buffers that have no shape yet."""
    both = (*model.named_parameters(), *model.named_buffers())
    return [name for name, tensor in both if is_lazy(tensor)]
