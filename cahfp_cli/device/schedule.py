"""From a trace to the kernels that ONNX Runtime runs, with the tensors that each reads and writes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

from cahfp_cli.coupling.meta_run import BATCH_NORMS
from cahfp_cli.coupling.registry import Axes
from cahfp_cli.coupling.trace import Operation, Trace
from cahfp_cli.device.arena import Schedule, Step, StepKind, Tensor
from cahfp_cli.device.composite import RECURRENT, Cell, cells_of
from cahfp_cli.device.sizes import ITEM_BYTES, Axis, Size

RENAMED = frozenset(
    {"view", "_unsafe_view", "_reshape_alias", "reshape", "unsqueeze", "squeeze", "flatten", "detach", "alias"}
    | {"clone", "contiguous", "native_dropout", "dropout", "_to_copy", "lift_fresh"}
)
"""No kernel, or one that hands its input on. A clone in torch makes a transpose real, which ONNX's own is already."""
IN_PLACE = frozenset(
    {"relu", "hardtanh", "relu6", "clamp", "clamp_min", "sigmoid", "tanh", "leaky_relu", "hardsigmoid"}
)
"""Computed while a convolution writes, or over what they read where nothing else reads it."""
POOLS = frozenset({"max_pool2d_with_indices", "max_pool2d", "avg_pool2d"})
SUMS = frozenset({"add", "add_"})
ATTENTION = frozenset({"bmm", "baddbmm", "_softmax"})
"""Attention is exported with shapes that it computes as it runs; the runtime does not know them before."""


def make_schedule(
    trace: Trace, depends: Sequence[bool], folded: Sequence[bool], size_of: Callable[[Axes], Size]
) -> Schedule:
    """The kernels of an evaluation-mode trace at batch 1.

    Args:
        depends: whether each value is computed from the input.
        folded: whether each operator is computed inside its neighbour, as a batch norm after a convolution.
        size_of: the size of a value's axes.
    """
    builder = _Builder(trace, depends, size_of)
    for operation, is_folded in zip(trace.operations, folded, strict=True):
        if any(depends[value] for value in operation.outputs):
            builder.add(operation, is_folded and operation.name in BATCH_NORMS)
    return builder.finish()


class _Builder:
    """Collects steps; `tensor` says in which tensor a value lives."""

    def __init__(self, trace: Trace, depends: Sequence[bool], size_of: Callable[[Axes], Size]) -> None:
        self._values, self._depends, self._size_of = trace.values, depends, size_of
        self._results = trace.results
        self._readers = Counter(v for operation in trace.operations for v in operation.inputs) + Counter(trace.results)
        self._tensors: list[Tensor] = []
        self._steps: list[Step] = []
        self._activated: set[int] = set()
        self._tensor = {value: self.allocate(value) for value in trace.inputs}
        self._given = frozenset(self._tensor.values())

    def allocate(self, value: int, itemsize: int | None = None, inferred: bool = True) -> int:
        """A new tensor as large as a value."""
        described = self._values[value]
        self._tensors.append(Tensor(self._size_of(described.axes).axes, itemsize or described.itemsize, inferred))
        return len(self._tensors) - 1

    def add(self, operation: Operation, is_folded: bool) -> None:
        """The kernels of one operator; none if it only renames its input or is computed where its input is."""
        inputs = [value for value in dict.fromkeys(operation.inputs) if self._depends[value]]
        out = operation.outputs[0]
        if out in operation.inputs:
            if out not in self._tensor:  # a buffer that the samples change
                self._tensor[out] = self.allocate(out)
            self._activated.add(self._tensor[out])
        elif (
            (is_folded and self._readers[inputs[0]] == 1) or operation.name in RENAMED or self._same_expanded(operation)
        ):
            self._tensor[out] = self._tensor[inputs[0]]
        elif self._in_place(operation, inputs):
            self._tensor[out] = self._tensor[inputs[0]]
            self._activated.add(self._tensor[out])
        else:
            self._add_kernels(operation, inputs)

    def _same_expanded(self, operation: Operation) -> bool:
        return operation.name == "expand" and self._elements(operation.inputs[0]) == self._elements(
            operation.outputs[0]
        )

    def _elements(self, value: int) -> tuple[object, ...]:
        axes = [axis for axis in self._size_of(self._values[value].axes).axes if axis.terms or axis.constant != 1]
        return tuple(axes)

    def _in_place(self, operation: Operation, inputs: list[int]) -> bool:
        alone = len(inputs) == 1 and self._readers[inputs[0]] == 1
        scaled = operation.name in {"mul", "div"} and len(operation.inputs) == 1
        return alone and (operation.name in IN_PLACE or scaled)

    def _add_kernels(self, operation: Operation, inputs: list[int]) -> None:
        out = operation.outputs[0]
        read = tuple(self._tensor[value] for value in inputs)
        if operation.name == "addmm" and self._values[out].axes[0].size > 1:
            self._chain(out, read, 1)  # product, then bias
        elif operation.name in RECURRENT:
            self._recurrent(operation, read)
        elif operation.name == "gelu":
            self._chain(out, read, 2, again=True)  # scaled, its error function, and the product with the input
        elif operation.name == "_safe_softmax":
            self._safe_softmax(out, read)
        else:
            known = operation.name not in ATTENTION
            outputs = tuple(self._new(v, known) for v in operation.outputs if self._depends[v] and self._used(v))
            self._steps.append(self._kernel(operation, read, outputs or (self._new(out),)))
            if operation.name in SUMS and len(read) == 2:
                self._fuse()

    def _used(self, value: int) -> bool:
        return self._readers[value] > 0

    def _new(self, value: int, inferred: bool = True) -> int:
        self._tensor[value] = self.allocate(value, inferred=inferred)
        return self._tensor[value]

    def _chain(self, out: int, read: tuple[int, ...], between: int, again: bool = False) -> None:
        """Kernel after kernel, each with a tensor of the output's size; the last reads the first's input `again`."""
        last = read
        for _ in range(between):
            last, before = (self.allocate(out),), last
            self._steps.append(Step("plain", before, last))
        self._steps.append(Step("plain", (*last, *read) if again else last, (self._new(out),)))

    def _recurrent(self, operation: Operation, read: tuple[int, ...]) -> None:
        """Layer by layer a kernel and the copy that puts its directions side by side; a batch that comes first is put
        behind the steps before. The widths of recurrent layers are fixed."""
        x = self._values[operation.inputs[0]]
        steps = self._size_of(x.axes[:-1]).axes
        last = read
        if len(x.axes) == 3 and len(x.axes[0]) == 1:
            last = (self._made(self._size_of(x.axes).axes),)
            self._steps.append(Step("plain", read, last))
        for cells in cells_of(operation, self._values, lambda labels: self._size_of((labels,)).axes[0]):
            axes = (*steps, replace(cells[0].gives, constant=sum(cell.gives.constant for cell in cells)))
            found = self._made(axes)
            held = working_memory(cells, prod(length.constant for length in steps))
            self._steps.append(Step("plain", last, (found,), workspace=Size((Axis(held),))))
            last = (self._made(axes),)
            self._steps.append(Step("plain", (found,), last))
        for value in operation.outputs:
            self._tensor[value] = last[0] if value == operation.outputs[0] else self.allocate(value)

    def _made(self, axes: tuple[Axis, ...]) -> int:
        """A new tensor of these axes."""
        self._tensors.append(Tensor(axes, ITEM_BYTES))
        return len(self._tensors) - 1

    def _safe_softmax(self, out: int, read: tuple[int, ...]) -> None:
        """Scores with their mask, softmax, where it is not a number, and zeros there: a kernel that takes two more."""
        masked, soft = self.allocate(out, inferred=False), self.allocate(out, inferred=False)
        invalid = self.allocate(out, itemsize=1, inferred=False)
        size = self._size_of(self._values[out].axes)
        twice = Size((*size.axes, replace(size.axes[0], constant=2, terms=())))
        self._steps += [
            Step("plain", read, (masked,)),
            Step("plain", (masked,), (soft,)),
            Step("plain", (soft,), (invalid,)),
            Step("plain", (soft, invalid), (self._new(out, inferred=False),), workspace=twice),
        ]

    def _kernel(self, operation: Operation, read: tuple[int, ...], outputs: tuple[int, ...]) -> Step:
        kind: StepKind = "plain"
        if operation.name == "convolution" and not operation.constants["transposed"]:
            return self._convolution(operation, read, outputs)
        if operation.name in POOLS:
            kind = "pool"
        elif operation.name == "cat" and operation.constants.get("dim", 0) in (1, -3):
            kind = "concat"
        elif operation.name in SUMS | BATCH_NORMS | IN_PLACE | {"mul"}:
            same = all(self._tensors[t].axes == self._tensors[outputs[0]].axes for t in read)
            kind = "join" if same and self._is_image(outputs[0]) else "plain"
        return Step(kind, read, outputs)

    def _is_image(self, tensor: int) -> bool:
        return len(self._tensors[tensor].axes) == 4

    def _convolution(self, operation: Operation, read: tuple[int, ...], outputs: tuple[int, ...]) -> Step:
        weight = self._size_of(self._values[operation.inputs[1]].axes).axes
        positions = self._tensors[outputs[0]].axes[2:]
        constants, groups = operation.constants, operation.constants["groups"]
        direct = groups == 1 and all(axis == replace(axis, constant=1, terms=()) for axis in weight[2:])
        direct = direct and set(constants["stride"]) == {1} and not any(constants["padding"])
        filters = weight[:1] if groups == 1 else ()
        columns = None if direct else (Size(weight[1:]), Size(filters), Size(positions))
        kind: StepKind = "plain"
        if self._is_image(outputs[0]) and groups == 1:
            kind = "conv"
        elif self._is_image(outputs[0]) and len(self._values[operation.inputs[1]].axes[1]) == 1:
            kind = "depthwise"
        return Step(kind, read, outputs, columns)

    def _fuse(self) -> None:
        """Move the convolution that gives an input of the last step, a sum, to just before it."""
        total = self._steps.pop()
        for place, tensor in enumerate(total.inputs):
            giver = next((n for n, step in enumerate(self._steps) if tensor in step.outputs), None)
            alone = sum(tensor in step.inputs for step in self._steps) == 0 and tensor not in self._activated
            if giver is None or not alone or self._steps[giver].kind not in ("conv", "depthwise"):
                continue
            if self._tensor_readers(tensor) == 1:
                self._steps.append(self._steps.pop(giver))
                total = replace(total, fuses=place) if total.kind == "join" else total
                break
        self._steps.append(total)

    def _tensor_readers(self, tensor: int) -> int:
        """Readers of the last name of a tensor."""
        return self._readers[[value for value, named in self._tensor.items() if named == tensor][-1]]

    def finish(self) -> Schedule:
        results = frozenset(self._tensor[value] for value in self._results if value in self._tensor)
        return Schedule(tuple(self._tensors), tuple(self._steps), self._given, results)


def working_memory(cells: Sequence[Cell], steps: int) -> int:
    """Numbers that ONNX Runtime's kernel of a recurrent layer holds: the gates of all steps (computed in the output
    where there is but one), and of the way back what it reads and gives in the order of that way. Beside them stand the
    states of single steps, in all three and a half times the gates of one."""
    gates = sum(cell.gates.constant for cell in cells)
    several = any(cell.gates != cell.holds for cell in cells)
    turned = sum(cell.reads.constant + cell.gives.constant for cell in cells[1:])
    return steps * (gates * several + turned) + 7 * gates // 2
