"""Small networks that calibrate a device: each as ONNX to be timed, and as the operators that the cost model sees.

Most are chains of one kind of operator in the settings where kernels differ: deep and shallow, on large and small
images, with channel counts that blocks fit and that they do not, with weights that a cache holds and that it cannot.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cahfp_cli.device.operators import Kind, Layout, Operator, Product
from cahfp_cli.device.sizes import Axis, Size
from cahfp_cli.device.workload import share_touched, taps_inside

OPSET, IR_VERSION = 18, 9


@dataclass(frozen=True)
class Microbenchmark:
    """model: input `x` at batch 1, fixed shape. operators: the same, with constant sizes."""

    name: str
    model: onnx.ModelProto
    operators: tuple[Operator, ...]


@dataclass(frozen=True)
class Conv:
    """outputs: channels; kernel, stride: of both image axes; groups: 0 for depthwise. clips: instead of a ReLU."""

    outputs: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    clips: bool = False


def fixed(*lengths: int) -> Size:
    """A size that no width changes."""
    return Size(tuple(Axis(length) for length in lengths))


class Chain:
    """A network that grows operator by operator; `shape` is that of the last output."""

    def __init__(self, *shape: int) -> None:
        self.shape: tuple[int, ...] = shape
        self.operators: list[Operator] = []
        self._input, self._last = shape, "x"
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(0)

    def conv(self, layer: Conv) -> None:
        """A convolution with bias and an activation that it is fused with."""
        _, channels, height, width = self.shape
        groups, outputs = layer.groups or channels, layer.outputs or channels
        own, kernel = channels // groups, (layer.kernel, layer.kernel)
        weights = (outputs, own, *kernel)
        options = {"kernel_shape": kernel, "strides": (layer.stride,) * 2, "pads": (layer.kernel // 2,) * 4}
        out = (1, outputs, -(-height // layer.stride), -(-width // layer.stride))
        kind: Kind = "conv" if groups == 1 else "depthwise" if own == 1 else "grouped"
        high, wide = (
            taps_inside(length, positions, layer.kernel, layer.stride, layer.kernel // 2)
            for length, positions in zip((height, width), out[2:], strict=True)
        )
        product = Product(
            fixed(1, *out[2:]),
            layer.kernel**2,
            Axis(channels),
            Axis(own),
            Axis(outputs),
            float(high.mean()),
            share_touched(high, wide),
        )
        self._add("Conv", out, [weights, (outputs,)], group=groups, **options)
        self.operators.append(
            Operator(
                "conv", kind, (fixed(*self.shape),), (fixed(*out),), (fixed(*weights),), product, (self._source(),)
            )
        )
        self.shape = out
        if layer.clips:
            self._add("Clip", out, [(), ()])
            self._append("clip", "clip", out, "same")
        else:
            self._add("Relu", out, [])

    def matmul(self, outputs: int) -> None:
        """A product with a weight matrix."""
        *rows, inputs = self.shape
        out = (*rows, outputs)
        self._add("MatMul", out, [(inputs, outputs)])
        product = Product(fixed(*rows), 1, Axis(inputs), Axis(inputs), Axis(outputs))
        self.operators.append(
            Operator(
                "matmul",
                "matmul",
                (fixed(*self.shape),),
                (fixed(*out),),
                (fixed(inputs, outputs),),
                product,
                (self._source(),),
            )
        )
        self.shape = out

    def double(self) -> None:
        """The sum of the last output with itself."""
        self._nodes.append(helper.make_node("Add", [self._last, self._last], [f"y{len(self._nodes)}"]))
        self._last = self._nodes[-1].output[0]
        size, source = fixed(*self.shape), self._source()
        self.operators.append(Operator("add", "memory", (size, size), (size,), sources=(source,) * 2, layout="same"))

    def block(self, outputs: int) -> None:
        """Two convolutions and their sum with what they started from, as in a residual network."""
        start, before = self._last, self._source()
        self.conv(Conv(outputs))
        self.conv(Conv(outputs))
        self._nodes.append(helper.make_node("Add", [self._last, start], [f"y{len(self._nodes)}"]))
        self._last = self._nodes[-1].output[0]
        size = fixed(*self.shape)
        sources = (self._source(), before)
        self.operators.append(Operator("add", "memory", (size, size), (size,), sources=sources, layout="same"))
        self._add("Relu", self.shape, [])

    def pool(self) -> None:
        """The maximum over windows of 2x2."""
        out = (*self.shape[:2], *(length // 2 for length in self.shape[2:]))
        self._add("MaxPool", out, [], kernel_shape=(2, 2), strides=(2, 2))
        self._append("pool", "pool", out, "whole")
        self.shape = out

    def view(self, *shape: int) -> None:
        """The same bytes in another shape."""
        name = f"s{len(self._nodes)}"
        self._weights.append(numpy_helper.from_array(np.array(shape, np.int64), name))
        self._nodes.append(helper.make_node("Reshape", [self._last, name], [f"y{len(self._nodes)}"]))
        self._last, self.shape = self._nodes[-1].output[0], shape
        self.operators.append(Operator("view", "view"))

    def mean(self) -> None:
        """The mean over each channel's image."""
        out = (*self.shape[:2], 1, 1)
        self._add("GlobalAveragePool", out, [])
        self._append("mean", "memory", out, "whole")
        self.shape = out

    def math(self, operator: str) -> None:
        """Softmax, Erf or LayerNormalization along the last axis."""
        last = self.shape[-1:]
        self._add(operator, self.shape, [last, last] if operator == "LayerNormalization" else [])
        self._append(operator, "math", self.shape, "plain")

    def built(self, name: str) -> Microbenchmark:
        """The network as it is now."""
        graph = helper.make_graph(
            self._nodes,
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self._input)],
            [helper.make_tensor_value_info(self._last, TensorProto.FLOAT, self.shape)],
            self._weights,
        )
        opset = [helper.make_opsetid("", OPSET)]
        return Microbenchmark(
            name, helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION), tuple(self.operators)
        )

    def _append(self, name: str, kind: Kind, out: tuple[int, ...], layout: Layout) -> None:
        """An operator without weights."""
        read, written = fixed(*self.shape), fixed(*out)
        self.operators.append(Operator(name, kind, (read,), (written,), sources=(self._source(),), layout=layout))

    def _source(self) -> int | None:
        return len(self.operators) - 1 if self.operators else None

    def _add(self, operator: str, shape: tuple[int, ...], weights: list[tuple[int, ...]], **options: Any) -> None:
        number = len(self._nodes)
        names = [f"w{number}.{i}" for i in range(len(weights))]
        for own, name in zip(weights, names, strict=True):
            values = self._random.standard_normal(own, dtype=np.float32) / np.float32(np.sqrt(np.prod(own[1:]) + 1))
            if operator == "Clip":  # its bounds, as of ReLU6
                values = np.full((), 0.0 if name.endswith("0") else 6.0, np.float32)
            self._weights.append(numpy_helper.from_array(np.asarray(values), name))
        self._nodes.append(helper.make_node(operator, [self._last, *names], [f"y{number}"], **options))
        self._last = f"y{number}"


def convolutions(name: str, channels: int, image: int, *layers: Conv, repeat: int = 1) -> Microbenchmark:
    """A chain of convolutions and, as in a classifier, a mean at its end."""
    chain = Chain(1, channels, image, image)
    for layer in layers * repeat:
        chain.conv(layer)
    chain.mean()
    return chain.built(name)


def classifier(name: str, image: int, widths: tuple[int, ...], residual: bool) -> Microbenchmark:
    """A whole small network: kernels of several kinds one after the other, as in the networks that are predicted."""
    chain = Chain(1, 3, image, image)
    chain.conv(Conv(widths[0]))
    for number, width in enumerate(widths):
        if residual:
            if number:
                chain.conv(Conv(width, stride=2))
            chain.block(width)
        else:
            chain.conv(Conv(width))
            chain.pool()
    chain.mean()
    return chain.built(name)


def microbenchmarks() -> Iterator[Microbenchmark]:
    """All of them; about 100, that take some 0.1 ms to 20 ms a call on a laptop."""
    for channels, image, kernel in [
        *(
            (16, 56, 3),
            (16, 32, 3),
            (48, 32, 3),
            (32, 16, 3),
            (64, 16, 3),
            (96, 16, 3),
            (64, 8, 3),
            (128, 8, 3),
            (128, 4, 3),
        ),
        *((256, 4, 3), (256, 2, 3), (64, 32, 1), (128, 16, 1), (256, 8, 1), (256, 4, 1), (512, 2, 1), (32, 16, 5)),
        *((36, 28, 3), (36, 14, 3), (64, 7, 3), (100, 7, 3), (128, 7, 3)),
        *((64, 3, 3), (128, 3, 3), (180, 3, 3), (256, 3, 3)),
    ]:
        name = f"conv {kernel}x{kernel}, {channels} channels, {image}x{image}"
        yield convolutions(name, channels, image, Conv(channels, kernel), repeat=4)
    for narrow, wide, image in ((32, 192, 16), (64, 256, 8), (16, 96, 32), (24, 144, 56)):
        yield convolutions(
            f"conv 1x1, {narrow}-{wide}, {image}x{image}", narrow, image, Conv(wide, 1), Conv(narrow, 1), repeat=2
        )
    for narrow, wide, image in ((16, 64, 28), (32, 128, 14)):
        name = f"conv 3x3, {narrow}-{wide}, {image}x{image}"
        yield convolutions(name, narrow, image, Conv(wide), Conv(narrow), repeat=2)
    for inputs, outputs, kernel, stride, image in ((3, 32, 3, 1, 32), (1, 16, 3, 1, 28), (3, 64, 7, 2, 64)):
        name = f"stem {kernel}x{kernel}, {inputs}-{outputs}, {image}x{image}"
        yield convolutions(name, inputs, image, Conv(outputs, kernel, stride))
    for channels, image in ((4, 32), (8, 32), (12, 16), (15, 8), (6, 28)):
        yield convolutions(f"narrow, {channels} channels, {image}x{image}", channels, image, Conv(channels), repeat=4)
    for narrow, wide, image in ((8, 48, 16), (12, 64, 8), (12, 48, 56)):
        name = f"narrow, {narrow}-{wide}, {image}x{image}"
        yield convolutions(name, narrow, image, Conv(wide, 1), Conv(narrow, 1), repeat=2)
    for channels, image in (
        *((18, 32), (33, 16), (63, 16), (63, 8), (101, 8), (101, 4), (199, 4), (57, 32), (250, 2), (170, 1)),
    ):
        yield convolutions(f"odd 3x3, {channels} channels, {image}x{image}", channels, image, Conv(channels), repeat=4)
    for narrow, wide, image in ((30, 185, 16), (63, 250, 8), (17, 99, 32), (121, 470, 4)):
        yield convolutions(
            f"odd 1x1, {narrow}-{wide}, {image}x{image}", narrow, image, Conv(wide, 1), Conv(narrow, 1), repeat=2
        )
    for odd, even, image in ((63, 64, 16), (101, 96, 8), (34, 32, 32), (45, 5, 28), (90, 10, 14), (150, 21, 7)):
        name = f"odd and even, {odd}-{even}, {image}x{image}"
        yield convolutions(name, odd, image, Conv(even), Conv(odd), repeat=2)
    for channels, image, kernel in (
        *((32, 32, 3), (48, 56, 3), (96, 16, 3), (144, 8, 3), (384, 4, 3), (64, 16, 5)),
        *((33, 32, 3), (95, 16, 3), (141, 8, 3), (378, 4, 3)),
    ):
        name = f"depthwise {kernel}x{kernel}, {channels} channels, {image}x{image}"
        yield convolutions(name, channels, image, Conv(0, kernel, groups=0), repeat=4)
    for rows, *dims in (
        *((1, 512, 512, 512), (1, 128, 10), (17, 64, 256, 64), (50, 96, 384, 96), (65, 192, 768, 192)),
        *((197, 128, 512, 128), (65, 190, 701, 190), (17, 96, 384, 96), (17, 48, 17, 48), (50, 64, 50, 64)),
    ):
        chain = Chain(1, rows, dims[0])
        for outputs in dims[1:]:
            chain.matmul(outputs)
        yield chain.built(f"matmul, {rows} rows, {'-'.join(map(str, dims))}")
    for shape in ((1, 64, 32, 32), (1, 128, 8, 8), (1, 65, 192), (1, 16, 4, 4)):
        chain = Chain(*shape)
        for _ in range(8):
            chain.double()
        yield chain.built(f"add, {'x'.join(map(str, shape))}")
    for channels, image, kernel, groups in (
        (64, 32, 1, 1),
        (48, 16, 3, 1),
        (96, 16, 3, 0),
        (144, 8, 3, 0),
        (132, 14, 1, 1),
    ):
        name = f"clip after {kernel}x{kernel}, {channels} channels, {image}x{image}, {groups or channels} groups"
        yield convolutions(name, channels, image, Conv(channels, kernel, groups=groups, clips=True), repeat=4)
    for rows, columns in ((17, 64), (65, 192)):
        chain = Chain(1, rows, columns)
        for _ in range(4):
            chain.view(1, columns, rows)
            chain.double()
            chain.view(1, rows, columns)
            chain.double()
        yield chain.built(f"views, {rows}x{columns}")
    for channels, image in ((64, 32), (32, 16), (36, 28), (20, 16), (100, 14), (180, 8)):
        chain = Chain(1, channels, image, image)
        chain.conv(Conv(channels, 1))
        for _ in range(3):
            chain.pool()
        yield chain.built(f"pool, {channels} channels, {image}x{image}")
    for operator, shape in (
        *(("Softmax", (1, 3, 65, 65)), ("Softmax", (1, 4, 17, 17)), ("Erf", (1, 65, 768)), ("Erf", (1, 17, 128))),
        *(("LayerNormalization", (1, 65, 192)), ("LayerNormalization", (1, 50, 96))),
    ):
        chain = Chain(*shape)
        for _ in range(4):
            chain.math(operator)
        yield chain.built(f"{operator}, {'x'.join(map(str, shape))}")
    for widths in (
        (32, 64, 128, 256),
        (20, 40, 80),
        (64, 128, 256, 384),
        (27, 55, 101, 203),
        (13, 39, 70),
        (17, 90, 33),
        (160, 320, 448),
        (288, 352, 512),
    ):
        for residual, kind in ((False, "plain"), (True, "residual")):
            name = f"{kind} network, {'-'.join(map(str, widths))}"
            yield classifier(name, 32, widths, residual)
    for channels, image, layers in (
        *((256, 4, 1), (256, 4, 2), (256, 4, 3), (256, 4, 6), (512, 4, 1), (512, 4, 2), (512, 4, 3), (512, 4, 4)),
        *((512, 2, 1), (512, 2, 2), (512, 2, 4), (384, 1, 4), (512, 1, 2)),
    ):
        name = f"{layers} layers of {channels} channels, {image}x{image}"
        yield convolutions(name, channels, image, Conv(channels), repeat=layers)
    for layers in (1, 2, 3, 4):  # 4.2 MB each
        chain = Chain(1, 1, 1024)
        for _ in range(layers):
            chain.matmul(1024)
        yield chain.built(f"{layers} x 4 MB of weights")
