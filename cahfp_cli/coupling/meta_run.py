"""Running a model on meta tensors, which carry shapes and no data: one forward pass under a mode that watches it.

Every run, to trace a network as to prove a slice of it, is made under the same conditions, whatever the caller's are.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cahfp_cli.coupling.conditions import Draws, conditions
from cahfp_cli.coupling.slicing import clone

BATCH_NORMS = frozenset({"native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"})
ACTIVATIONS = frozenset(
    {"relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh"}
    | {"sigmoid", "tanh", "softplus"}
)
SOFTMAXES = frozenset({"_softmax", "_log_softmax", "_safe_softmax"})
ARITHMETIC = frozenset({"add", "sub", "mul", "div"})
RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})
PRODUCTS = frozenset(
    {nn.functional.linear, nn.functional.scaled_dot_product_attention, torch.matmul, torch.Tensor.matmul}
    | {torch.Tensor.__matmul__}
)


@dataclass(frozen=True)
class Mode:
    """One way to run the model: training or evaluation, with a batch; `draws` is the pattern of its random numbers (see
    `conditions.Draws`), empty if they are drawn."""

    training: bool
    batch: int
    draws: tuple[int, ...] = ()


EVALUATION = Mode(training=False, batch=1)
TRAINING = Mode(training=True, batch=2, draws=(0,))
OTHER_TRAINING = tuple(replace(TRAINING, draws=pattern) for pattern in ((1,), (0, 1), (1, 0)))
"""What is run as well where random numbers may decide what runs, as when layers are left out: with all that can be left
out, and with every second of it, which ties whatever may come to follow one another."""


@dataclass(frozen=True)
class Subject:
    """A network that may be run as often as needed: its model, which is left as it is, the shape and dtype of one
    sample, whether its tensors are on the meta device, as they are unless it reads values, and the dtype that torch
    makes tensors in where its code names none; `steered` if random numbers may decide what runs; `given`, (n,
    *input_shape), what it is run on in place of constants."""

    model: nn.Module
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    on_meta: bool
    default_dtype: torch.dtype
    steered: bool = False
    given: torch.Tensor | None = None

    @property
    def modes(self) -> tuple[Mode, ...]:
        """How it is traced and proved: in evaluation and in training."""
        return (EVALUATION, TRAINING, *(OTHER_TRAINING if self.steered else ()))

    def fresh(self) -> nn.Module:
        """A copy to run: models may change their own state on the first forward."""
        return clone(self.model)

    def sample(self, batch: int) -> torch.Tensor:
        """A batch of inputs; with values 0.5, or token 1, so that every run sees the same; of given samples the first,
        over and over if they are too few."""
        if self.given is not None:
            return self.given[torch.arange(batch) % len(self.given)]
        shape = (batch, *self.input_shape)
        if self.on_meta:
            return torch.empty(shape, device="meta", dtype=self.dtype)
        return torch.full(shape, 0.5 if self.dtype.is_floating_point else 1, dtype=self.dtype)


class EagerMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that does not import the compiler, seconds of work, only to keep it out."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class ContiguousProducts(TorchFunctionMode):
    """Gives matrix products contiguous operands: they choose their operators by memory layout, and an axis of length 1
    has every layout, so that a narrow model would run other operators than the full one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            args = tuple(value.contiguous() if isinstance(value, torch.Tensor) else value for value in args)
        return func(*args, **(kwargs or {}))


class WholeRecurrences(TorchFunctionMode):
    """Runs a recurrent layer on meta tensors as one operator (see rules/recurrent.py); else it runs as several for
    each time step."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RECURRENT and isinstance(args[2], list) and args[0].is_meta:  # packed sequences have them fourth
            states = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
            output, *final = torch.ops.cahfp.recurrent(args[0], states, args[2], 2 if args[7] else 1)
            return (output, *final)
        return func(*args, **(kwargs or {}))


def forward(
    subject: Subject,
    model: nn.Module,
    mode: Mode,
    sample: torch.Tensor,
    *watchers: AbstractContextManager[Any],
    draws: Draws | None = None,
) -> Any:
    """One forward pass of a copy or slice of the subject's model inside the watchers, under the same conditions as
    every other. `draws`: in place of the mode's, to see whether there were any."""
    model.train(mode.training)
    draws = draws or (Draws(mode.draws) if mode.draws else None)
    # Attention by its plain formula: fused operators hide it where the model runs on real tensors.
    with conditions(subject.default_dtype, draws), sdpa_kernel(SDPBackend.MATH), ExitStack() as stack:
        stack.enter_context(ContiguousProducts())
        stack.enter_context(WholeRecurrences())
        for watcher in watchers:
            stack.enter_context(watcher)
        return model(sample)


def execute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator. On meta tensors some would run as dozens of Python operators, only to find a shape that is
    their input's, and would import the compiler for it."""
    name, x = func.overloadpacket.__name__, args[0] if args else None
    if isinstance(x, torch.Tensor) and x.is_meta:
        if name in BATCH_NORMS and all(len(v) == x.shape[1] for v in args[1:5] if isinstance(v, torch.Tensor)):
            return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
        if name == "native_layer_norm" and all(
            tuple(v.shape) == tuple(args[1]) == tuple(x.shape[-len(args[1]) :]) for v in args[2:4] if v is not None
        ):
            statistics = x.new_empty((*x.shape[: -len(args[1])], *(1 for _ in args[1])))
            return torch.empty_like(x, memory_format=torch.contiguous_format), statistics, statistics.clone()
        if name in ACTIVATIONS or name in SOFTMAXES:
            return torch.empty_like(x)
        if name.endswith("_") and name[:-1] in ACTIVATIONS:
            return x
        if func is torch.ops.aten.mean.dim and "dtype" not in kwargs:
            return torch.ops.aten.sum.dim_IntList(*args, **kwargs)
        if name == "addmm" and args[1].shape[1] == args[2].shape[0] and alike(args[1], args[2]):
            return x.new_empty(args[1].shape[0], args[2].shape[1])
        if name == "bmm" and x.shape[2] == args[1].shape[1] and alike(x, args[1]) and len(x) == len(args[1]):
            return x.new_empty(x.shape[0], x.shape[1], args[1].shape[2])
        if name in ARITHMETIC and len(args) > 1 and x.is_floating_point() and isinstance(args[1], int | float):
            return torch.empty_like(x)
        if name in ARITHMETIC and len(args) > 1 and isinstance(args[1], torch.Tensor) and alike(x, args[1]):
            shape = torch.broadcast_shapes(x.shape, args[1].shape)  # type: ignore[no-untyped-call]
            return x.new_empty(shape)
    return func(*args, **kwargs)


def alike(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors give a third of their kind when added or multiplied."""
    return x.dtype == y.dtype and x.is_floating_point() and y.is_meta and x.dim() > 0 and y.dim() > 0


def bind(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the operator's schema, defaults filled in."""
    bound = {}
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            bound[argument.name] = args[i]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def tensors_in(values: Any) -> list[torch.Tensor]:
    """Tensors among values and in lists of them, in order."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(v for v in value if isinstance(v, torch.Tensor))
    return found


def offset_of(func: Any, bound: Mapping[str, Any]) -> tuple[int, int] | None:
    """Axis and index where a cut of a part of an axis starts; with the length of the result this says which part."""
    if func.overloadpacket.__name__ != "slice":
        return None
    x, axis, start = bound["self"], bound["dim"], bound.get("start") or 0
    length = x.shape[axis]
    return axis % x.dim(), min(max(start + length if start < 0 else start, 0), length)
