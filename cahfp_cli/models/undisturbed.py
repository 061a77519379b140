"""Networks that are the same after they ran."""

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cahfp_cli.models.tensors import copied, same_numbers


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back what running a network changes in it: its modules' attributes, what lists, dictionaries and sets among
    them hold, and its buffers. Networks that keep something of a run, such as positions for the length that they last
    saw, would run other operators the next time than those that were traced."""
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    values = (value for _, own in attributes for value in own.values())
    held = [(value, copy.copy(value)) for value in values if isinstance(value, dict | list | set | deque)]
    dense = (buffer for buffer in model.buffers() if buffer.layout == torch.strided and not buffer.is_meta)
    buffers = [(buffer, copied(buffer)) for buffer in dense]
    try:
        yield
    finally:
        for module, own in attributes:
            vars(module).clear()
            vars(module).update(own)
        for value, content in held:
            value.clear()
            value.extend(content) if isinstance(value, list | deque) else value.update(content)
        with torch.no_grad():
            for buffer, own_values in buffers:
                if not same_numbers(buffer, own_values):
                    buffer.copy_(own_values)
