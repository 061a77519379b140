"""Which module runs: a stack of frames kept by forward hooks while a model runs."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


@dataclass
class Frame:
    """One activation of a module: what ran in it so far, its children's included.

    path: the module's name in the model; None if it is not part of the model.
    calls: how often each function was called at each place; operators: how many ran.
    """

    path: str | None
    kind: type[nn.Module]
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    operators: int = 0


@dataclass(frozen=True)
class Site:
    """A place in the user's code: the class of the module that ran, and the how-manyeth operator of its forward."""

    kind: type[nn.Module] | None
    operator: int


class ModuleStack:
    """Context manager; `frames` are the activations under way, the innermost last; `ran` the modules that ran."""

    def __init__(self, model: nn.Module) -> None:
        self.frames: list[Frame] = []
        self.ran: set[str] = set()
        self._paths = {id(module): name for name, module in model.named_modules()}

    def __enter__(self) -> Self:
        self._hooks = [
            register_module_forward_pre_hook(self._push),
            register_module_forward_hook(self._pop, always_call=True),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _push(self, module: nn.Module, inputs: Any) -> None:
        path = self._paths.get(id(module))
        self.frames.append(Frame(path, type(module)))
        if path is not None:
            self.ran.add(path)

    def _pop(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.frames.pop()

    def innermost(self) -> str:
        """Path of the innermost module of the model that runs."""
        return next((frame.path for frame in reversed(self.frames) if frame.path is not None), "")

    def site(self) -> Site:
        """Count one operator; its place in the innermost module that is not one of torch's own layers."""
        for frame in self.frames:
            frame.operators += 1
        for frame in reversed(self.frames):
            if not frame.kind.__module__.startswith("torch.nn."):
                return Site(frame.kind, frame.operators)
        return Site(None, self.frames[0].operators if self.frames else 0)
