"""Watching what the consumers of a network's channel groups read while it runs.

A consumer is a convolution or a matrix product that contracts channels; consumers are told apart by their numbers among
the contracting calls of a forward pass.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cahfp_cli.coupling.calls import CONTRACTING, channels_read
from cahfp_cli.coupling.groups import KEPT, ChannelGroups, Consumer
from cahfp_cli.errors import InputError
from cahfp_cli.running.logits import class_rows

DETACHING = frozenset({torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__})  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Reach:
    """How the gates of a network can be measured; see reach.py.

    lifted: whether the places where the network itself stops gradients are lifted while it is measured.
    unreached: numbers of the consumers from which no gradient comes although the logits depend on what they read.
    alone: whether samples have to go through one by one: something is read in rows that are not those of a sample.
    """

    lifted: bool = True
    unreached: frozenset[int] = frozenset()
    alone: bool = False


class LiftedStops(TorchFunctionMode):
    """Runs a network as if it never said `no_grad`, `inference_mode` or `detach`: the derivative is that of what it
    computes, whether or not its author wanted to train it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DETACHING:
            func, args, kwargs = torch.Tensor.view_as, (args[0], args[0]), {}
        elif func is torch.Tensor.detach_:
            return args[0]
        stopped = not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        if not stopped or func is torch._C._set_grad_enabled:  # that is `no_grad` itself, which ends as it began
            return func(*args, **kwargs)
        with torch.inference_mode(False), torch.enable_grad():
            return func(*args, **kwargs)


class ConsumerInputs(TorchFunctionMode):
    """Collects what every consumer reads while a model runs: the consumer, its input, the axis of the channels.

    calls: how many contracting calls there were, those of no group among them.
    """

    def __init__(self, groups: ChannelGroups) -> None:
        super().__init__()
        self.consumers = {c.call: c for c in groups.consumers if (c.groups != KEPT).any()}
        self.seen: list[tuple[Consumer, torch.Tensor, int]] = []
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CONTRACTING:
            consumer = self.consumers.get(self.calls)
            self.calls += 1
            if consumer is not None:
                x, axis = channels_read(func, args, kwargs), CONTRACTING[func][1]
                if x.dim() <= max(axis, 0) or x.shape[axis] != len(consumer.groups):
                    raise InputError(
                        f"gates of {consumer.tensor} cannot be measured: the model runs in another way now"
                    )
                watched = self.watch(consumer, x, axis)
                args = tuple(watched if value is x else value for value in args)
                kwargs = {name: watched if value is x else value for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def watch(self, consumer: Consumer, x: torch.Tensor, axis: int) -> torch.Tensor:
        """A tensor of its own for the consumer: nothing flows through it but what this consumer reads."""
        watched = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        self.seen.append((consumer, watched, axis))
        return watched

    def run(self, model: nn.Module, samples: torch.Tensor, lifted: bool) -> torch.Tensor:
        """Logits (b, classes) of a model in evaluation mode, float32 or wider, while the consumers are watched.

        Raises: InputError: a consumer was not seen, or the output is not one row of logits a sample.
        """
        with ExitStack() as stack:
            if lifted:
                stack.enter_context(LiftedStops())
            stack.enter_context(self)
            output = model(samples)
        if len(self.seen) < len(self.consumers):
            raise InputError("gates cannot be measured: the model runs fewer products than when it was traced")
        return class_rows(output, len(samples))


class WithoutChannels(ConsumerInputs):
    """The network with some channels zero in what some consumers read, and nowhere else.

    Args: removed: int64 (channels,), which, by the number of the consumer.
    """

    def __init__(self, groups: ChannelGroups, removed: Mapping[int, torch.Tensor]) -> None:
        super().__init__(groups)
        self._removed = removed

    def watch(self, consumer: Consumer, x: torch.Tensor, axis: int) -> torch.Tensor:
        self.seen.append((consumer, x, axis))
        channels = self._removed.get(consumer.call)
        return x if channels is None else x.index_fill(axis, channels.to(x.device), 0)


@torch.no_grad()
def logits_without(
    model: nn.Module, groups: ChannelGroups, samples: torch.Tensor, removed: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """Logits (b, classes) with channels removed as `WithoutChannels` does."""
    return WithoutChannels(groups, removed).run(model, samples, lifted=False)
