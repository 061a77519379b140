"""Copies of a network that share nothing with it, tensors exchanged on the way.

A copy must not reach the original: a dictionary that two modules share is one dictionary in the copy too, and a
function that closes over the network closes over its copy. What cannot be copied is named, never shared in silence.
"""

import copy
import functools
import threading
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from cahfp_cli.errors import InputError, first_line

M = TypeVar("M", bound=nn.Module)
Memo = dict[int, Any]
"""Of every object met so far its copy, by the original's id: only what the network itself keeps alive may be noted."""

STATE_METHODS = ("__getstate__", "__setstate__", "__reduce_ex__")
PLAIN = frozenset({int, float, bool, str, bytes, type(None), torch.dtype, torch.device, type, ModuleType})
CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set, deque})
LOCKS: dict[type, Callable[[], Any]] = {type(make()): make for make in (threading.Lock, threading.RLock)}


class UncopyableError(Exception):
    """An object's own way to be copied failed."""


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name; tied ones under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def copy_with(model: M, change: Callable[[str, torch.Tensor], torch.Tensor]) -> M:
    """A copy in which every parameter and buffer is `change(name, tensor)`; tied tensors stay tied.

    The originals are never copied, so this needs no more memory than what `change` returns.
    Raises: InputError: a module holds something that cannot be copied.
    """
    memo: Memo = {}
    with torch.inference_mode(False):  # else it could never be trained
        for name, tensor in tensors_of(model).items():
            if id(tensor) in memo:
                continue
            new = change(name, tensor.detach())
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = new
        return copy_modules(model, memo)


def copy_modules(model: M, memo: Memo) -> M:
    """Copy a network; what `memo` has is taken from there. Modules first as empty shells, so that whatever is met on
    the way may point at any of them."""
    shells = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{name or 'the network'} is a scripted module (torch.jit), which cannot be cut.\n"
                "Pass the module that it was scripted from."
            )
        kind: Any = type(module)
        if has_own_copy(kind):
            continue
        memo[id(module)] = shell = kind.__new__(kind)
        shells.append((module, shell))
    for module, shell in shells:
        for name, value in vars(module).items():
            if name == "_compiled_call_impl":
                continue
            try:
                shell.__dict__[name] = copy_value(value, memo)
            except UncopyableError as error:
                raise InputError(
                    f"the network cannot be copied: {type(module).__name__}.{name} holds what has no copy ({error}).\n"
                    "Make it when the network runs, or leave it out of the module."
                ) from error
    try:
        return copy_value(model, memo)  # type: ignore[no-any-return]
    except UncopyableError as error:
        raise InputError(f"the network, a {type(model).__name__}, cannot be copied: {error}") from error


def has_own_copy(kind: type[nn.Module]) -> bool:
    """Whether a class of modules says itself how it is copied. Asked of `nn.Module` as it is now, since libraries give
    it methods of their own; a convolution's adds attributes that files of old versions lack, and no more."""
    convolution = nn.modules.conv._ConvNd.__setstate__
    return getattr(kind, "__deepcopy__", None) is not getattr(nn.Module, "__deepcopy__", None) or any(
        getattr(kind, name) not in (getattr(nn.Module, name), convolution) for name in STATE_METHODS
    )


def copy_value(value: Any, memo: Memo) -> Any:
    """`copy.deepcopy`, with what it does not do: functions are bound to the copies of what they close over, computed
    tensors are detached, locks are new. Several times faster for modules, most of whose values are plain."""
    kind = type(value)
    if kind in PLAIN or (kind is tuple and all(type(part) in PLAIN for part in value)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind in CONTAINERS or is_record(value):
        return copy_container(value, memo)
    new: Any
    if kind is tuple:
        new = tuple(copy_value(part, memo) for part in value)
        new = memo.get(id(value), new)  # a part may lead back to it
    elif kind in (FunctionType, MethodType, BuiltinFunctionType, functools.partial):
        new = copy_function(value, memo)
    elif kind is weakref.ref:
        new = weakref.ref(memo[id(value())]) if id(value()) in memo else value
    elif kind in (torch.Tensor, nn.Parameter) and not value.is_leaf:
        new = value.detach().clone()
    elif kind in LOCKS:
        new = LOCKS[kind]()
    elif kind is torch.Generator:
        new = torch.Generator(value.device)
        new.set_state(value.get_state())
    else:
        try:
            new = copy.deepcopy(value, memo)
        except Exception as error:  # whatever an object of the user's raises
            raise UncopyableError(f"{kind.__name__}: {first_line(error)}") from error
    memo[id(value)] = new
    return new


def copy_container(value: Any, memo: Memo) -> Any:
    """What is noted before its parts are copied, since they may lead back to it."""
    kind: Any = type(value)
    new = kind.__new__(kind)
    if isinstance(value, deque):
        new = deque(maxlen=value.maxlen)
    elif isinstance(value, defaultdict):
        new.default_factory = copy_value(value.default_factory, memo)
    memo[id(value)] = new
    if isinstance(value, dict):
        new.update([(copy_value(key, memo), copy_value(part, memo)) for key, part in value.items()])
    elif isinstance(value, set):
        new.update([copy_value(part, memo) for part in value])
    elif isinstance(value, list | deque):
        new.extend([copy_value(part, memo) for part in value])
    else:
        vars(new).update([(name, copy_value(part, memo)) for name, part in vars(value).items()])
    return new


def is_record(value: object) -> bool:
    """Whether an object is its attributes and no more: nothing of its own says how it is copied."""
    kind = type(value)
    own = ("__new__", "__reduce_ex__", "__reduce__", "__getstate__")
    return (
        hasattr(value, "__dict__")
        and all(getattr(kind, name) is getattr(object, name) for name in own)
        and not any(hasattr(kind, name) for name in ("__deepcopy__", "__setstate__"))
        and not any("__slots__" in vars(base) for base in kind.__mro__)
    )


def copy_function(function: Any, memo: Memo) -> Any:
    """The function itself if it holds nothing that has a copy of its own, else one that holds the copies."""
    match function:
        case MethodType():
            return MethodType(function.__func__, copy_value(function.__self__, memo))
        case BuiltinFunctionType():  # a method of a list, say
            owner = function.__self__
            plain = owner is None or type(owner) in PLAIN
            return function if plain else getattr(copy_value(owner, memo), function.__name__)
        case functools.partial():
            arguments, keywords = copy_value(function.args, memo), copy_value(function.keywords, memo)
            return functools.partial(copy_value(function.func, memo), *arguments, **keywords)
    held = (*(function.__closure__ or ()), function.__defaults__, function.__kwdefaults__)
    cells = tuple(copy_cell(cell, memo) for cell in function.__closure__ or ())
    defaults, keywords = (copy_default(value, memo) for value in (function.__defaults__, function.__kwdefaults__))
    if all(new is old for new, old in zip((*cells, defaults, keywords), held, strict=True)):
        return function
    new = FunctionType(function.__code__, function.__globals__, function.__name__, defaults, cells)
    new.__kwdefaults__, new.__dict__ = keywords, dict(function.__dict__)
    new.__qualname__, new.__module__ = function.__qualname__, function.__module__
    return new


def copy_default(value: Any, memo: Memo) -> Any:
    """The default values of a function's arguments; the same object where none of them needs a copy."""
    new = copy_value(value, memo)
    if value is None:
        return None
    parts = (new.values(), value.values()) if isinstance(value, dict) else (new, value)
    return value if all(a is b for a, b in zip(*parts, strict=True)) else new


def copy_cell(cell: CellType, memo: Memo) -> CellType:
    """A closed-over variable: the same one if its value needs no copy. Functions that share one go on sharing it."""
    if id(cell) in memo:
        return memo[id(cell)]  # type: ignore[no-any-return]
    try:
        value = cell.cell_contents
    except ValueError:  # not set yet
        return cell
    memo[id(cell)] = new = CellType()  # before its value, which may be a function that closes over it
    new.cell_contents = copy_value(value, memo)
    if new.cell_contents is value:
        memo[id(cell)] = cell
    return memo[id(cell)]  # type: ignore[no-any-return]
