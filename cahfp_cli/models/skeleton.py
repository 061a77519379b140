"""Networks without the memory of their parameters: to compare shapes with, and to cut a submodel out of."""

import gc
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from cahfp_cli.checkpoint.metadata import ModelSpec
from cahfp_cli.errors import InputError
from cahfp_cli.models.random_streams import positions, random_streams
from cahfp_cli.models.spec import build, construct
from cahfp_cli.models.tensors import saved_state

WITHOUT_VALUES = frozenset({torch.empty, torch.rand, torch.randn})
"""What makes tensors whose values are nothing but a start for training."""


def outline(spec: ModelSpec, input_shape: tuple[int, ...], classes: int | None) -> nn.Module | None:
    """The network that `build` would make, of meta tensors alone: nothing is allocated, whatever the spec asks for.
    None where the factory reads values.

    Raises: UsageError: as `build`.
    """
    try:
        with torch.device("meta"):
            return build(spec, input_shape, classes)
    except InputError:
        return None


def skeleton(spec: ModelSpec, input_shape: tuple[int, ...], classes: int | None) -> nn.Module:
    """The network that `build` would make, with its parameters on the meta device; buffers, and whatever else its code
    keeps, have the values that `build` gives them. Where that cannot be known it is `build`'s whole network: if random
    numbers are drawn for what is no parameter, or parameters are read.

    Raises: UsageError, InputError: as `build`.
    """
    watch = Valueless()
    with random_streams(0), parameters_on_meta(), watch:
        start = positions()
        try:
            network = construct(spec, input_shape, classes)
        except InputError:
            network = None
        drawn = positions() != start
    if network is None or drawn or watch.left_over(network):
        return build(spec, input_shape, classes)
    return network


class Valueless(TorchFunctionMode):
    """Makes tensors that nobody has written yet on the meta device, and remembers every meta tensor that comes about:
    of those no values are known, so that each must be a parameter in the end, or gone."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in WITHOUT_VALUES and kwargs.get("device") is None and kwargs.keys().isdisjoint({"out", "generator"}):
            kwargs["device"] = "meta"
        result = func(*args, **kwargs)
        for value in result if isinstance(result, list | tuple) else (result,):
            if isinstance(value, torch.Tensor) and value.is_meta:
                self._made.append(weakref.ref(value))
        return result

    def left_over(self, network: nn.Module) -> bool:
        """Whether anything without values is alive beside the parameters."""
        own = {id(parameter) for parameter in network.parameters()}
        for _ in range(2):
            alive = [tensor for made in self._made if (tensor := made()) is not None]
            if all(id(tensor) in own for tensor in alive) and not any(b.is_meta for b in network.buffers()):
                return False
            del alive
            gc.collect()
        return True


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While the block runs, a parameter that a module gets loses its values there and then, so that at no time there is
    memory for more than one. Frozen ones keep them: they may be constants."""
    moved = WeakIdKeyDictionary()

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.requires_grad:
            return None
        if parameter not in moved:
            bare = nn.Parameter(parameter.detach().to("meta"))
            vars(bare).update(vars(parameter))
            moved[parameter] = bare
        shared: nn.Parameter = moved[parameter]
        return shared

    handle = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]  # it may return a parameter
    try:
        yield
    finally:
        handle.remove()


def unsaved_bytes(network: nn.Module) -> int:
    """Of the buffers that its code makes and no file holds."""
    saved = saved_state(network)
    return sum(
        math.prod(buffer.shape) * buffer.element_size() for name, buffer in network.named_buffers() if name not in saved
    )
