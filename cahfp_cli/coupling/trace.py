"""One run of a model on meta tensors under a dispatch mode: every operator's rule labels its output's axes.

Meta tensors carry shapes and no data, so a trace costs no arithmetic. What no rule knows is pinned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cahfp_cli.coupling.atoms import fixed
from cahfp_cli.coupling.registry import RULES, Axes, Call, Couplings, ParameterView, Result, fixed_like
from cahfp_cli.coupling.rules.pointwise import is_pointwise, pointwise
from cahfp_cli.coupling.slicing import tensors_of

BATCH_NORMS = frozenset({"native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"})
ACTIVATIONS = frozenset(
    {"relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh"}
    | {"sigmoid", "tanh", "softplus"}
)
ARITHMETIC = frozenset({"add", "sub", "mul", "div"})
SAME_VALUE = frozenset({"detach", "alias", "_to_copy", "clone", "lift_fresh", "contiguous"})


@dataclass(frozen=True)
class Value:
    """A tensor of the trace: its labels, bytes an element, the value whose memory it shares, its parameter if any."""

    axes: Axes
    itemsize: int
    storage: int
    parameter: ParameterView | None = None


@dataclass(frozen=True)
class Operation:
    """One operator call of a trace: name, values read and written, constants that a cost model needs, and the numbers
    that it computes with."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    constants: Mapping[str, Any]
    numbers: tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """Everything one run showed, in order; `inputs` and `results` are the values that went in and came out."""

    values: list[Value]
    operations: list[Operation]
    inputs: tuple[int, ...]
    results: tuple[int, ...]


class EagerMode(TorchDispatchMode):
    """A dispatch mode that does not import the compiler, seconds of work, only to keep it out."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@dataclass
class Tracer(EagerMode):
    """Labels tensors while a model runs. `known` names the tensors (parameters, buffers) whose labels are given."""

    couplings: Couplings
    known: Mapping[int, tuple[str, Axes]]
    values: list[Value] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []  # an id is only a name while its tensor lives
        self._storages: dict[int, int] = {}

    def number(self, tensor: torch.Tensor) -> int:
        """The value that a tensor is; one never seen before is a parameter, a buffer or a constant."""
        if id(tensor) not in self._numbers:
            name, axes = self.known.get(id(tensor), (None, None))
            view = None if name is None else ParameterView(name, tuple(range(tensor.dim())))
            self.add(tensor, tuple(fixed(n) for n in tensor.shape) if axes is None else axes, view)
        return self._numbers[id(tensor)]

    def add(self, tensor: torch.Tensor, axes: Axes, parameter: ParameterView | None = None) -> int:
        number = len(self.values)
        storage = self._storages.setdefault(tensor.untyped_storage()._cdata, number)
        self.values.append(Value(axes, tensor.element_size(), storage, parameter))
        self._numbers[id(tensor)] = number
        self._alive.append(tensor)
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        bound = bind(func, args, kwargs or {})
        read = [self.number(t) for t in tensors_in(bound.values())]
        output = execute(func, args, kwargs or {})
        written = tensors_in([output])
        if not written:
            return output
        call = Call(
            func,
            bound,
            output,
            axes_of=lambda t: self.values[self.number(t)].axes,
            parameter_of=lambda t: self.values[self.number(t)].parameter,
        )
        labels = self.label(call)
        per_tensor = [labels] if isinstance(labels, tuple) else list(labels)
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        numbers = []
        for tensor, axes in zip(outputs, per_tensor, strict=True):
            if not isinstance(tensor, torch.Tensor):
                continue
            if id(tensor) not in self._numbers:  # in-place operators return a tensor that is already known
                self.add(tensor, axes if axes is not None else tuple(fixed(n) for n in tensor.shape), seen(call))
            numbers.append(self._numbers[id(tensor)])
        constants = {k: v for k, v in bound.items() if isinstance(v, int | float | bool) or is_int_list(v)}
        shapes = tuple(tuple(t.shape) for t in written)
        name = func.overloadpacket.__name__
        used = numbers_used(func, bound)
        self.operations.append(Operation(name, tuple(read), tuple(numbers), shapes, constants, used))
        return output

    def label(self, call: Call) -> Result:
        """Labels of the output by the operator's rule; without one, all inputs are pinned."""
        name = call.op.overloadpacket.__name__
        found = RULES.get(name)
        if found is not None:
            return found(self.couplings, call)
        if is_pointwise(call.op):
            return pointwise(self.couplings, call)
        for tensor in tensors_in(call.arguments.values()):
            for labels in call.axes_of(tensor):
                self.couplings.atoms.pin(labels, f"operator {name} has no rule")
        return fixed_like(call.output)


def execute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator. On meta tensors some would run as dozens of Python operators, only to find a shape that is
    their input's, and would import the compiler for it."""
    name, x = func.overloadpacket.__name__, args[0] if args else None
    if isinstance(x, torch.Tensor) and x.is_meta:
        if name in BATCH_NORMS and all(len(v) == x.shape[1] for v in args[1:5] if isinstance(v, torch.Tensor)):
            return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
        if name in ACTIVATIONS:
            return torch.empty_like(x)
        if name.endswith("_") and name[:-1] in ACTIVATIONS:
            return x
        if func is torch.ops.aten.mean.dim and "dtype" not in kwargs:
            return torch.ops.aten.sum.dim_IntList(*args, **kwargs)
        if name == "addmm" and args[1].shape[1] == args[2].shape[0] and alike(args[1], args[2]):
            return x.new_empty(args[1].shape[0], args[2].shape[1])
        if name in ARITHMETIC and len(args) > 1 and isinstance(args[1], torch.Tensor) and alike(x, args[1]):
            return x.new_empty(torch.broadcast_shapes(x.shape, args[1].shape))
    return func(*args, **kwargs)


def alike(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors give a third of their kind when added or multiplied."""
    return x.dtype == y.dtype and x.is_floating_point() and y.is_meta and x.dim() > 0 and y.dim() > 0


def seen(call: Call) -> ParameterView | None:
    """The parameter behind the output of a transposition or copy, so that `x @ w.T` is known to use w."""
    first = next(iter(call.arguments.values()), None)
    view = call.parameter_of(first) if isinstance(first, torch.Tensor) else None
    name = call.op.overloadpacket.__name__
    if view is None or name in SAME_VALUE:
        return view
    if name in ("t", "transpose") and len(view.dims) > 1:
        a, b = call.arguments.get("dim0", 0), call.arguments.get("dim1", 1)
        dims = list(view.dims)
        dims[a], dims[b] = dims[b], dims[a]
        return ParameterView(view.name, tuple(dims))
    if name == "permute":
        return ParameterView(view.name, tuple(view.dims[d] for d in call["dims"]))
    return None


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


def is_int_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, int) for v in value)


def numbers_used(func: Any, bound: Mapping[str, Any]) -> tuple[str, ...]:
    """The Python numbers that an elementwise operator or a new tensor's entries are made of, as text (NaN == NaN)."""
    if not is_pointwise(func) and func.overloadpacket.__name__ not in ("full", "new_full", "scalar_tensor"):
        return ()
    return tuple(f"{name}={value!r}" for name, value in bound.items() if isinstance(value, int | float))


@dataclass(frozen=True)
class Logged:
    """One operator of a run: its name, output shapes, and the numbers that it computed with."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    numbers: tuple[str, ...]


class OperatorLog(EagerMode):
    """The operators of a run, in order; those that return no tensor are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Logged] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = execute(func, args, kwargs or {})
        written = tensors_in([output])
        if written:
            shapes = tuple(tuple(t.shape) for t in written)
            used = numbers_used(func, bind(func, args, kwargs or {}))
            self.entries.append(Logged(func.overloadpacket.__name__, shapes, used))
        return output


PRODUCTS = frozenset(
    {nn.functional.linear, nn.functional.scaled_dot_product_attention, torch.matmul, torch.Tensor.matmul}
    | {torch.Tensor.__matmul__}
)


class ContiguousProducts(TorchFunctionMode):
    """Gives matrix products contiguous operands: they choose their operators by memory layout, and an axis of length 1
    has every layout, so that a narrow model would run other operators than the full one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            args = tuple(value.contiguous() if isinstance(value, torch.Tensor) else value for value in args)
        return func(*args, **(kwargs or {}))


def forward(model: nn.Module, inputs: tuple[torch.Tensor, ...], training: bool, mode: TorchDispatchMode) -> Any:
    """One forward pass under a dispatch mode, without gradients."""
    model.train(training)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would hide the whole attention in one operator
    try:
        with torch.no_grad(), ContiguousProducts(), mode:
            return model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def run(
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    *,
    training: bool,
    couplings: Couplings,
    labels: Mapping[str, Axes],
) -> Trace:
    """Trace one forward pass of a model whose tensors are on the meta device.

    Args:
        model: parameters and buffers on meta; its mode is set by `training`. Buffers may change (they hold no data).
        inputs: meta tensors; all their axes are fixed.
        labels: for each parameter and buffer by name, the labels of its axes.
    Returns:
        The trace; ties, pins and consumers go to `couplings`. Every axis of every output is pinned.
    """
    known: dict[int, tuple[str, Axes]] = {}
    for name, tensor in tensors_of(model).items():
        known.setdefault(id(tensor), (name, labels[name]))
    tracer = Tracer(couplings, known)
    given = tuple(tracer.number(sample) for sample in inputs)
    output = forward(model, inputs, training, tracer)
    results = [tracer.number(t) for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    for result in results:
        for axis in tracer.values[result].axes:
            couplings.atoms.pin(axis, "output of the model")
    return Trace(tracer.values, tracer.operations, given, tuple(results))


def labels_of_parameters(model: nn.Module, couplings: Couplings) -> dict[str, Axes]:
    """Fresh labels for every parameter and buffer; tied tensors share theirs, non-persistent buffers are pinned."""
    labels: dict[str, Axes] = {}
    by_identity: dict[int, Axes] = {}
    saved = model.state_dict(keep_vars=True)
    for name, tensor in tensors_of(model).items():
        if id(tensor) not in by_identity:
            prunable = name in saved and tensor.is_floating_point()
            by_identity[id(tensor)] = tuple(couplings.atoms.fresh(n) if prunable else fixed(n) for n in tensor.shape)
        labels[name] = by_identity[id(tensor)]
    return labels
