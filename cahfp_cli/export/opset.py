"""Files in another opset than the exporter's, and the lowest IR version that a file needs.

A node stays as it is where the other opset knows its operator with the same attributes; what stands at its default is
left out. Of operators that differ, some are written in another way (`ADAPTERS`); the rest refuses the opset. That a
node's types are allowed too shows when the file is loaded, and that it means the same when it is compared.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cahfp_cli.errors import VerificationError

DEFAULT_OPSET = 18
"""The opset that PyTorch's exporter writes."""
LOWEST, HIGHEST = 13, 20
FUNCTIONS_NEED = 8
"""The IR version that files with functions of their own need."""

Graph = onnx.GraphProto | onnx.FunctionProto
Adapter = Callable[[onnx.NodeProto, "Converter"], list[onnx.NodeProto] | None]


def at_opset(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """A file of opset 18 in another one, in place.

    Raises: VerificationError: an operator cannot be written in it; the nearest opset in which the file can be is named.
    """
    problem = Converter(proto, opset).problem()
    if problem is not None:
        step = 1 if opset < DEFAULT_OPSET else -1
        nearest = next(
            one for one in range(opset, DEFAULT_OPSET + step, step) if Converter(proto, one).problem() is None
        )
        raise VerificationError(
            f"the network cannot be written in ONNX opset {opset}, which has no {problem} as this network needs it; "
            f"the nearest that works is --opset {nearest}"
        )
    Converter(proto, opset).convert()
    return proto


def lowest_ir(proto: onnx.ModelProto) -> int:
    """The lowest IR version that a file of these opsets may have: older runtimes refuse newer ones unread."""
    needed = helper.find_min_ir_version_for(proto.opset_import, ignore_unknown=True)
    return max(needed, FUNCTIONS_NEED if proto.functions else 0)


class Converter:
    """Converts the nodes of a file from the exporter's opset to `opset`."""

    def __init__(self, proto: onnx.ModelProto, opset: int) -> None:
        self.opset = opset
        self._proto = proto
        self._constants = constants(proto.graph)
        self._new: list[onnx.TensorProto] = []
        self._ranks = ranks(proto.graph)

    def problem(self) -> str | None:
        """The first operator that cannot be converted."""
        nodes = (node for graph in self._graphs() for node in graph.node)
        return next((node.op_type for node in nodes if self._converted(node) is None), None)

    def convert(self) -> None:
        """In place. `problem` must have found none."""
        if self.opset == DEFAULT_OPSET:
            return
        for graph in list(self._graphs()):
            nodes = [new for node in graph.node for new in self._converted(node) or []]
            del graph.node[:]
            graph.node.extend(nodes)
        self._proto.graph.initializer.extend(self._new)
        self._drop_unused()
        for imports in (self._proto.opset_import, *(function.opset_import for function in self._proto.functions)):
            for entry in imports:
                if entry.domain == "":
                    entry.version = self.opset

    def _drop_unused(self) -> None:
        """Remove constants that nothing reads any more."""
        read = {name for graph in self._graphs() for node in graph.node for name in node.input}
        read |= {value.name for value in self._proto.graph.output}
        kept = [tensor for tensor in self._proto.graph.initializer if tensor.name in read]
        if len(kept) < len(self._proto.graph.initializer):
            del self._proto.graph.initializer[:]
            self._proto.graph.initializer.extend(kept)

    def _graphs(self) -> Iterator[Graph]:
        """The graph, the functions, and the graphs inside their nodes."""
        pending: list[Graph] = [self._proto.graph, *self._proto.functions]
        while pending:
            graph = pending.pop(0)
            yield graph
            pending += [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]

    def _converted(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """What stands for a node; None if nothing can."""
        if node.domain != "" or self.opset == DEFAULT_OPSET or since(node, DEFAULT_OPSET) == since(node, self.opset):
            return [node]
        adapter = ADAPTERS.get(node.op_type)
        found = None if adapter is None else adapter(node, self)
        return found if found is not None else self.kept(node)

    def kept(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """The node without attributes at their defaults, if the opset takes it so."""
        if not onnx.defs.has(node.op_type, self.opset):
            return None
        theirs = onnx.defs.get_schema(node.op_type, DEFAULT_OPSET)
        ours = onnx.defs.get_schema(node.op_type, self.opset)
        kept = [a for a in node.attribute if a.name in ours.attributes or not is_default(a, theirs)]
        names = list(node.input)
        while names and not names[-1]:
            names.pop()
        if any(attribute.name not in ours.attributes for attribute in kept) or len(names) > ours.max_input:
            return None
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.attribute[:], copy.input[:]
        copy.attribute.extend(kept)
        copy.input.extend(names)
        return [copy]

    def constant(self, name: str) -> Any:
        """The numbers of an input that is one; None of others."""
        return numpy_helper.to_array(self._constants[name]) if name in self._constants else None

    def rank(self, name: str) -> int | None:
        """Number of axes of a value, None where the file does not say."""
        return self._ranks.get(name)

    def new_constant(self, name: str, array: Any) -> str:
        """Put a constant into the file, for nodes that are put there too."""
        self._new.append(numpy_helper.from_array(np.asarray(array), name))
        return name


def since(node: onnx.NodeProto, opset: int) -> int | None:
    """The opset in which an operator became what it is in `opset`; None where it is unknown there."""
    known = onnx.defs.has(node.op_type, opset)
    return onnx.defs.get_schema(node.op_type, opset).since_version if known else None


def is_default(attribute: onnx.AttributeProto, schema: onnx.defs.OpSchema) -> bool:
    """Whether an attribute says what goes without saying."""
    default = schema.attributes[attribute.name].default_value if attribute.name in schema.attributes else None
    if default is None or default.type == onnx.AttributeProto.UNDEFINED:
        return False
    return bool(helper.get_attribute_value(attribute) == helper.get_attribute_value(default))


def ranks(graph: onnx.GraphProto) -> dict[str, int]:
    """Number of axes of every value of which a graph says the shape."""
    values = (*graph.value_info, *graph.input, *graph.output)
    found = {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")}
    return found | {tensor.name: len(tensor.dims) for tensor in graph.initializer}


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Tensors whose numbers stand in the graph, by name."""
    found = {
        node.output[0]: attribute.t
        for node in graph.node
        for attribute in node.attribute
        if node.op_type == "Constant" and attribute.name == "value"
    }
    return found | {tensor.name: tensor for tensor in graph.initializer}


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def with_attributes(node: onnx.NodeProto, inputs: list[str], attributes: dict[str, Any]) -> onnx.NodeProto:
    return helper.make_node(node.op_type, inputs, list(node.output), node.name, **attributes)


def reduction(node: onnx.NodeProto, converter: Converter) -> list[onnx.NodeProto] | None:
    """Below opset 18 the axes are an attribute."""
    if converter.opset >= DEFAULT_OPSET or len(node.input) < 2 or not node.input[1]:
        return None
    axes = converter.constant(node.input[1])
    if axes is None or axes.size == 0:
        return None
    attributes = {k: v for k, v in attributes_of(node).items() if k != "noop_with_empty_axes"}
    return [with_attributes(node, [node.input[0]], {**attributes, "axes": axes.tolist()})]


def split(node: onnx.NodeProto, converter: Converter) -> list[onnx.NodeProto] | None:
    """Below opset 18 the number of parts is that of the outputs, and all are equal where no sizes are given."""
    if converter.opset >= DEFAULT_OPSET:
        return None
    attributes = {k: v for k, v in attributes_of(node).items() if k != "num_outputs"}
    return [with_attributes(node, list(node.input), attributes)]


def reshape(node: onnx.NodeProto, converter: Converter) -> list[onnx.NodeProto] | None:
    """Below opset 14 a 0 always means an axis of the input; `allowzero` makes a difference only where there is one.
    Sizes that are computed have none, as no axis is empty."""
    sizes = converter.constant(node.input[1])
    if converter.opset >= 14 or (sizes is not None and 0 in sizes):
        return None
    return [with_attributes(node, list(node.input), {})]


def shape(node: onnx.NodeProto, converter: Converter) -> list[onnx.NodeProto] | None:
    """Below opset 15 it gives all axes, of which some are then taken."""
    attributes = attributes_of(node)
    if converter.opset >= 15 or not attributes:
        return None
    out = node.output[0]
    start, end = (
        converter.new_constant(f"{out}.{key}", np.array([attributes.get(key, default)], np.int64))
        for key, default in (("start", 0), ("end", np.iinfo(np.int64).max))
    )
    whole = helper.make_node("Shape", list(node.input), [f"{out}.all"], f"{node.name}.all")
    return [whole, helper.make_node("Slice", [f"{out}.all", start, end], [out], node.name)]


def layer_normalization(node: onnx.NodeProto, converter: Converter) -> list[onnx.NodeProto] | None:
    """Below opset 17 it is written out."""
    attributes, rank = attributes_of(node), converter.rank(node.input[0])
    if converter.opset >= 17 or rank is None or any(node.output[1:]):
        return None
    x, out = node.input[0], node.output[0]
    axes = list(range(attributes.get("axis", -1) % rank, rank))
    scale = converter.constant(node.input[1])
    dtype = np.float32 if scale is None else scale.dtype
    epsilon = converter.new_constant(f"{out}.epsilon", np.array(attributes.get("epsilon", 1e-5), dtype))
    step = {name: f"{out}.{name}" for name in ("mean", "centred", "square", "variance", "safe", "deviation", "normal")}
    scaled = f"{out}.scaled" if len(node.input) > 2 else out

    def make(kind: str, inputs: list[str], output: str, **more: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], f"{node.name}.{output.rpartition('.')[2]}", **more)

    nodes = [
        make("ReduceMean", [x], step["mean"], axes=axes),
        make("Sub", [x, step["mean"]], step["centred"]),
        make("Mul", [step["centred"], step["centred"]], step["square"]),
        make("ReduceMean", [step["square"]], step["variance"], axes=axes),
        make("Add", [step["variance"], epsilon], step["safe"]),
        make("Sqrt", [step["safe"]], step["deviation"]),
        make("Div", [step["centred"], step["deviation"]], step["normal"]),
        make("Mul", [step["normal"], node.input[1]], scaled),
    ]
    return nodes if scaled == out else [*nodes, make("Add", [scaled, node.input[2]], out)]


def hard_swish(node: onnx.NodeProto, converter: Converter) -> list[onnx.NodeProto] | None:
    """Below opset 14 it is x times its hard sigmoid."""
    gate = f"{node.output[0]}.gate"
    return [
        helper.make_node("HardSigmoid", list(node.input), [gate], f"{node.name}.gate", alpha=1 / 6, beta=0.5),
        helper.make_node("Mul", [node.input[0], gate], list(node.output), node.name),
    ]


def mish(node: onnx.NodeProto, converter: Converter) -> list[onnx.NodeProto] | None:
    """Below opset 18 it is x tanh(softplus(x))."""
    soft, gate = f"{node.output[0]}.softplus", f"{node.output[0]}.gate"
    return [
        helper.make_node("Softplus", list(node.input), [soft], f"{node.name}.softplus"),
        helper.make_node("Tanh", [soft], [gate], f"{node.name}.gate"),
        helper.make_node("Mul", [node.input[0], gate], list(node.output), node.name),
    ]


def dft(node: onnx.NodeProto, converter: Converter) -> list[onnx.NodeProto] | None:
    """From opset 20 on the axis is an input."""
    if converter.opset < 20:
        return None
    attributes = attributes_of(node)
    axis = converter.new_constant(f"{node.output[0]}.axis", np.int64(attributes.pop("axis", 1)))
    inputs = [*node.input, *[""] * (2 - len(node.input)), axis]
    return [with_attributes(node, inputs, attributes)]


def grid_sample(node: onnx.NodeProto, converter: Converter) -> list[onnx.NodeProto] | None:
    """From opset 20 on the modes have other names."""
    attributes = attributes_of(node)
    mode = attributes.get("mode", b"bilinear").decode()
    if converter.opset < 20:
        return None
    renamed = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    return [with_attributes(node, list(node.input), {**attributes, "mode": renamed})]


REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
ADAPTERS: dict[str, Adapter] = {
    **dict.fromkeys((f"Reduce{name}" for name in REDUCTIONS), reduction),
    "Split": split,
    "Reshape": reshape,
    "Shape": shape,
    "LayerNormalization": layer_normalization,
    "HardSwish": hard_swish,
    "Mish": mish,
    "DFT": dft,
    "GridSample": grid_sample,
}
"""How operators are written where the other opset has them in another way; None leaves a node to `Converter.kept`."""
