"""One run of a model on meta tensors under a dispatch mode: every operator's rule labels its output's axes.

Meta tensors carry shapes and no data, so a trace costs no arithmetic. What no rule knows is pinned.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cahfp_cli.coupling.atoms import fixed
from cahfp_cli.coupling.calls import CallRecord
from cahfp_cli.coupling.conditions import Draws
from cahfp_cli.coupling.copying import tensors_of
from cahfp_cli.coupling.meta_run import EagerMode, Mode, Subject, bind, execute, forward, offset_of, tensors_in
from cahfp_cli.coupling.module_stack import ModuleStack, Site
from cahfp_cli.coupling.operator_log import is_int_list, numbers_used
from cahfp_cli.coupling.registry import RULES, Axes, Call, Couplings, ParameterView, Result, fixed_like
from cahfp_cli.coupling.rewriting import CallRecorder
from cahfp_cli.coupling.rules.pointwise import is_pointwise, pointwise
from cahfp_cli.errors import first_line
from cahfp_cli.models.outputs import all_tensors_of

READING = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"})
MASKING = frozenset({"index", "index_put", "index_put_", "_unsafe_index"})
"""Operators that return what a tensor holds, or as many rows as it says; the latter where their indices are masks."""


@dataclass(frozen=True)
class Value:
    """A tensor of the trace: its labels, bytes an element, the value whose memory it shares, its parameter if any."""

    axes: Axes
    itemsize: int
    storage: int
    parameter: ParameterView | None = None


@dataclass(frozen=True)
class Operation:
    """One operator call of a trace: name, values read and written, constants that a cost model needs, the numbers
    that it computes with, where a cut of an axis starts (`offset`: axis and index), its place in the code, and the
    path of the innermost module that ran it."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    constants: Mapping[str, Any]
    numbers: tuple[str, ...]
    offset: tuple[int, int] | None
    site: Site
    module: str


@dataclass(frozen=True)
class Trace:
    """Everything one run showed, in order; `inputs` and `results` are the values that went in and came out, `reached`
    the parameters and buffers that an operator read, `ran` the modules that ran; `reads_values` if the code looked at
    what tensors hold, so that it may go another way for other data; `steered` if that may have been random.
    """

    values: list[Value]
    operations: list[Operation]
    calls: list[CallRecord]
    inputs: tuple[int, ...]
    results: tuple[int, ...]
    reached: frozenset[str]
    ran: frozenset[str]
    reads_values: bool
    steered: bool


class TracerError(RuntimeError):
    """A fault of ours, which says nothing about the network."""


@dataclass
class Tracer(EagerMode):
    """Labels tensors while a model runs. `known` names the tensors (parameters, buffers) whose labels are given."""

    couplings: Couplings
    known: Mapping[int, tuple[str, Axes]]
    stack: ModuleStack
    values: list[Value] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}
        self._shapes = {name: tuple(len(labels) for labels in axes) for name, axes in self.known.values()}
        self._alive: list[torch.Tensor] = []  # an id is only a name while its tensor lives
        self._storages: dict[int, int] = {}
        self.reads_values = False

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether an operator has read or written the tensor."""
        return id(tensor) in self._numbers

    def number(self, tensor: torch.Tensor) -> int:
        """The value that a tensor is; one never seen before is a parameter, a buffer or a constant."""
        if id(tensor) not in self._numbers:
            name, axes = self.known.get(id(tensor), (None, None))
            view = None if name is None else ParameterView(name, tuple(range(tensor.dim())))
            self.add(tensor, tuple(fixed(n) for n in tensor.shape) if axes is None else axes, view)
        return self._numbers[id(tensor)]

    def axes(self, tensor: torch.Tensor) -> Axes:
        """Labels of a tensor's axes."""
        return self.values[self.number(tensor)].axes

    def add(self, tensor: torch.Tensor, axes: Axes, parameter: ParameterView | None = None) -> int:
        number = len(self.values)
        try:
            storage = self._storages.setdefault(tensor.untyped_storage()._cdata, number)
        except NotImplementedError:  # sparse tensors have several, those inside torch.vmap none of their own
            storage = number
        self.values.append(Value(axes, tensor.element_size(), storage, parameter))
        self._numbers[id(tensor)] = number
        self._alive.append(tensor)
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        bound = bind(func, args, kwargs or {})
        tensors = tensors_in(bound.values())
        read = [self.number(t) for t in tensors]
        output = execute(func, args, kwargs or {})
        try:
            self.note(func, bound, tensors, read, output)
        except Exception as error:
            name = func.overloadpacket.__name__
            raise TracerError(f"operator {name} cannot be noted: {first_line(error)}") from error
        return output

    def note(self, func: Any, bound: dict[str, Any], tensors: list[torch.Tensor], read: list[int], output: Any) -> None:
        """Write down an operator that ran: what it read and gave, and the labels of that."""
        written = tensors_in([output])
        name = func.overloadpacket.__name__
        masks = name in MASKING and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        self.reads_values |= name in READING or masks
        if not written:
            return
        call = Call(
            func,
            bound,
            output,
            axes_of=self.axes,
            parameter_of=lambda t: self.values[self.number(t)].parameter,
        )
        labels = self.label(call)
        per_tensor = [labels] if isinstance(labels, tuple) else list(labels)
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        view = seen(call, self._shapes, tensors)
        numbers = []
        for tensor, axes in zip(outputs, per_tensor, strict=True):
            if not isinstance(tensor, torch.Tensor):
                continue
            # In-place operators return a tensor that is already known, those that are no arithmetic with other axes.
            if id(tensor) not in self._numbers or (name.endswith("_") and not is_arithmetic(call.op)):
                self.add(tensor, axes if axes is not None else tuple(fixed(n) for n in tensor.shape), view)
            numbers.append(self._numbers[id(tensor)])
        constants = {k: v for k, v in bound.items() if isinstance(v, int | float | bool) or is_int_list(v)}
        shapes = tuple(tuple(t.shape) for t in written)
        used, offset = numbers_used(func, bound), offset_of(func, bound)
        self.operations.append(
            Operation(
                name,
                tuple(read),
                tuple(numbers),
                shapes,
                constants,
                used,
                offset,
                self.stack.site(),
                self.stack.innermost(),
            )
        )

    def label(self, call: Call) -> Result:
        """Labels of the output by the operator's rule; all inputs are pinned without one, and where it does not foresee
        such a call: that says nothing against the network."""
        name = call.op.overloadpacket.__name__
        found = RULES.get(name, pointwise) if is_arithmetic(call.op) else RULES.get(name.removesuffix("_"))
        reason = f"operator {name} has no rule"
        if found is not None:
            try:
                labels = found(self.couplings, call)
                check_labels(labels, call.output)
                return labels
            except Exception as error:  # a rule may meet what it was not made for
                reason = f"a call of operator {name} that its rule does not foresee ({first_line(error)})"
        for tensor in tensors_in(call.arguments.values()):
            for axis in call.axes_of(tensor):
                self.couplings.atoms.pin(axis, reason)
        return fixed_like(call.output)


def is_arithmetic(op: Any) -> bool:
    """Whether an operator has a rule of this name or computes entry by entry: in place, it leaves axes as they are."""
    return op.overloadpacket.__name__ in RULES or is_pointwise(op)


def check_labels(labels: Result, output: Any) -> None:
    """Raises: ValueError: a rule's labels are not those of its output's axes."""
    outputs = [output] if isinstance(output, torch.Tensor) else list(output)
    for tensor, axes in zip(outputs, [labels] if isinstance(labels, tuple) else labels, strict=True):
        if isinstance(tensor, torch.Tensor) and axes is not None and tuple(map(len, axes)) != tuple(tensor.shape):
            raise ValueError(f"axes of {tuple(map(len, axes))} for an output of {tuple(tensor.shape)}")


def seen(call: Call, known: Mapping[str, tuple[int, ...]], read: Sequence[torch.Tensor]) -> ParameterView | None:
    """The parameter behind an output: `x @ w.T` uses w, and so does a product with a standardised w.

    Args:
        known: shapes of the parameters by name.
        read: every tensor that the operator reads; all must come from parameters.
    """
    views = [call.parameter_of(tensor) for tensor in read]
    output = call.output if isinstance(call.output, torch.Tensor) else tensors_in([call.output])[0]
    view = next((v for v in views if v is not None and math.prod(known[v.name]) == output.numel()), None)
    if view is None or None in views:
        return None
    name, shape = call.op.overloadpacket.__name__, tuple(output.shape)
    if name in ("t", "transpose") and len(view.dims) > 1:
        a, b = call.arguments.get("dim0", 0), call.arguments.get("dim1", 1)
        dims = list(view.dims)
        dims[a], dims[b] = dims[b], dims[a]
        return ParameterView(view.name, tuple(dims))
    if name == "permute" and view.dims:
        return ParameterView(view.name, tuple(view.dims[d] for d in call["dims"]))
    if view.dims and shape == tuple(1 if d is None else known[view.name][d] for d in view.dims):
        return view
    if shape == known[view.name]:
        return ParameterView(view.name, tuple(range(len(shape))))
    # The same axes among others of length 1, as a matrix is that is used as a 1x1 kernel.
    long = [d for d in view.dims if d is not None and known[view.name][d] > 1]
    if view.dims and [known[view.name][d] for d in long] == [n for n in shape if n > 1]:
        return ParameterView(view.name, tuple(long.pop(0) if n > 1 else None for n in shape))
    return ParameterView(view.name, ())


def run(subject: Subject, mode: Mode, *, couplings: Couplings, labels: Mapping[str, Axes]) -> Trace:
    """Trace one forward pass of a copy of a network.

    Args: labels: for each parameter and buffer by name, the labels of its axes.
    Returns:
        The trace; ties, pins and consumers go to `couplings`. Every axis of every output is pinned.
    """
    model = subject.fresh()
    known: dict[int, tuple[str, Axes]] = {}
    own = tensors_of(model)
    for name, tensor in own.items():
        known.setdefault(id(tensor), (name, labels[name]))
    stack = ModuleStack(model)
    tracer = Tracer(couplings, known, stack)
    recorder = CallRecorder(stack, couplings, tracer.number, tracer.axes)
    sample = subject.sample(mode.batch)
    given = (tracer.number(sample),)
    draws = Draws(mode.draws) if mode.draws else None
    output = forward(subject, model, mode, sample, stack, recorder, tracer, draws=draws)
    results = [tracer.number(t) for t in all_tensors_of(output)]
    for result in results:
        for axis in tracer.values[result].axes:
            couplings.atoms.pin(axis, "output of the model")
    reads_values = recorder.reads_values or tracer.reads_values
    return Trace(
        tracer.values,
        tracer.operations,
        recorder.records,
        given,
        tuple(results),
        reached=frozenset(name for name, tensor in own.items() if tracer.knows(tensor)),
        ran=frozenset(stack.ran),
        reads_values=reads_values,
        steered=draws is not None and (draws.as_numbers or (draws.made and reads_values)),
    )


def labels_of_parameters(model: nn.Module, couplings: Couplings) -> dict[str, Axes]:
    """Fresh labels for every parameter and buffer of real numbers; tied tensors share theirs, others are pinned."""
    labels: dict[str, Axes] = {}
    by_identity: dict[int, Axes] = {}
    for name, tensor in tensors_of(model).items():
        if id(tensor) not in by_identity:
            prunable = tensor.is_floating_point() and tensor.layout == torch.strided
            by_identity[id(tensor)] = tuple(couplings.atoms.fresh(n) if prunable else fixed(n) for n in tensor.shape)
        labels[name] = by_identity[id(tensor)]
    return labels
