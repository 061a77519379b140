"""fp16 and int8 files: what is in them, that they classify as the fp32 file does, and that bad ones are not kept."""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from cahfp_cli.data.spec import load_data
from cahfp_cli.device.catalogue import load_profile
from cahfp_cli.errors import VerificationError
from cahfp_cli.export import quantised
from cahfp_cli.export.int8_layout import Int8Layout, layout_for, layout_of_machine
from cahfp_cli.export.onnx_file import export_onnx
from cahfp_cli.export.quantised import CalibrationReader, Quantisation, export_quantised
from cahfp_cli.models.resnet import resnet20
from cahfp_cli.models.vgg import vgg11
from cahfp_cli.running import processor

METADATA = {"cahfp.checkpoint": "0" * 64, "cahfp.tool": "cahfp 0"}
SHAPE = (1, 8, 8)
UNSIGNED = Int8Layout("uint8")
EIGHT_BITS = (TensorProto.INT8, TensorProto.UINT8)


def vit():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    images = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **images))


NETWORKS = {
    "resnet20": lambda: resnet20(SHAPE, 10, 0.25),
    "vgg11": lambda: vgg11(SHAPE, 10, 0.125),
    "vit": vit,
}


def trained(make):
    """A network that tells digits apart: on an untrained one, the class is decided by noise."""
    torch.manual_seed(0)
    model, train = make(), load_data("digits@train")
    x, y = torch.from_numpy(train.x), torch.from_numpy(train.y)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(6):
        for rows in torch.randperm(len(x)).split(64):
            output = model(x[rows])
            loss = nn.functional.cross_entropy(getattr(output, "logits", output), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


@pytest.fixture(scope="module", params=NETWORKS)
def source(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    export_onnx(trained(NETWORKS[request.param]), SHAPE, path, METADATA)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The fp32 file of a tiny network whose last layer is 4 x 3."""
    path = tmp_path_factory.mktemp("small") / "model.onnx"
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    export_onnx(nn.Sequential(*layers, nn.Linear(4, 10)).eval(), SHAPE, path, METADATA)
    return path


def wanted(dtype, layout=UNSIGNED):
    test = load_data("digits@test")
    return Quantisation(dtype, load_data("digits@train").x, test, True, layout)


def run(path, x):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_the_figures_are_those_of_the_two_files(source, tmp_path, dtype):
    # In this machine's own layout: without VNNI, sums of products of 8-bit weights overflow on x86.
    made = export_quantised(source, tmp_path / "q.onnx", wanted(dtype, layout_of_machine()))
    test = load_data("digits@test")
    expected, found = run(source, test.x), run(tmp_path / "q.onnx", test.x)
    figures = made.comparison
    assert figures.samples == len(test)
    assert figures.agreement == np.mean(expected.argmax(1) == found.argmax(1))
    assert figures.accuracy == np.mean(found.argmax(1) == test.y)
    assert figures.fp32_accuracy == np.mean(expected.argmax(1) == test.y) > 0.6
    assert figures.accuracy >= figures.fp32_accuracy - 0.02
    assert figures.difference == pytest.approx(np.abs(found - expected).max() / max(1, np.abs(expected).max()))
    assert 0 < figures.difference < (0.01 if dtype == "fp16" else 0.25)
    assert made.size == (tmp_path / "q.onnx").stat().st_size < source.stat().st_size
    assert [entry.name for entry in tmp_path.iterdir()] == ["q.onnx"]


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_opset_batch_and_metadata_stay_and_nothing_else_is_said(source, tmp_path, dtype):
    export_quantised(source, tmp_path / "q.onnx", wanted(dtype))
    before, proto = onnx.load(source), onnx.load(tmp_path / "q.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [(o.domain, o.version) for o in before.opset_import]
    assert {entry.key: entry.value for entry in proto.metadata_props} == {**METADATA, "cahfp.dtype": dtype}
    for ours, theirs in ((proto.graph.input, before.graph.input), (proto.graph.output, before.graph.output)):
        assert ours[0].name == theirs[0].name
        assert ours[0].type.tensor_type.elem_type == TensorProto.FLOAT
        assert ours[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    content = (tmp_path / "q.onnx").read_bytes()
    for private in (str(tmp_path), tempfile.gettempdir() + "/", str(Path.home()) + "/", sys.prefix, ".py"):
        assert private.encode() not in content
    for batch in (1, 7):
        assert run(tmp_path / "q.onnx", np.zeros((batch, *SHAPE), np.float32)).shape == (batch, 10)


def test_weights_of_every_product_are_int8_with_a_scale_for_each_output_channel(source, tmp_path):
    export_quantised(source, tmp_path / "q.onnx", wanted("int8"))
    before, graph = onnx.load(source).graph, onnx.load(tmp_path / "q.onnx").graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    whole = {tensor.name: numpy_helper.to_array(tensor) for tensor in before.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    products = [n for n in before.node if n.op_type in ("Conv", "Gemm", "MatMul") and n.input[1] in whole]
    checked = 0
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in maker:
            continue
        dequantise = maker[node.input[1]]
        if dequantise.op_type != "DequantizeLinear" or dequantise.input[0] not in arrays:
            continue
        assert maker[node.input[0]].op_type == "DequantizeLinear"
        weight, scale, zero = (arrays[name] for name in dequantise.input)
        axis = next((a.i for a in dequantise.attribute if a.name == "axis"), 1)
        transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        assert axis % weight.ndim == (0 if node.op_type == "Conv" or transposed else weight.ndim - 1)
        assert weight.dtype == np.int8 and not zero.any()
        assert scale.shape == (weight.shape[axis],)
        original = whole[dequantise.input[0].removesuffix("_quantized")]
        restored = weight * np.expand_dims(scale, [a for a in range(weight.ndim) if a != axis % weight.ndim])
        assert np.abs(restored - original).max() <= 0.51 * scale.max()
        checked += 1
    assert checked == len(products) > 5
    assert {node.op_type for node in graph.node} >= {"QuantizeLinear", "DequantizeLinear"}


def test_norms_and_rectifiers_are_folded_where_a_network_is_all_convolutions(small, tmp_path):
    export_quantised(small, tmp_path / "q.onnx", replace(wanted("int8"), compared=same_class(small)))
    kinds = {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}
    assert not kinds & {"BatchNormalization", "Relu"}


def same_class(path):
    """Random samples that the fp32 file is sure of."""
    digits = load_data("digits@test")
    logits = np.sort(run(path, digits.x), axis=1)
    sure = logits[:, -1] - logits[:, -2] > np.quantile(logits[:, -1] - logits[:, -2], 0.5)
    return replace(digits, x=digits.x[sure], y=digits.y[sure])


@pytest.mark.parametrize(
    ("layout", "dtype", "largest"),
    [
        (UNSIGNED, np.uint8, 127),
        (Int8Layout("uint8", reduce_range=True), np.uint8, 64),
        (Int8Layout("int8"), np.int8, 127),
        (Int8Layout("int8", symmetric=True), np.int8, 127),
    ],
)
def test_the_layout_is_as_asked(small, tmp_path, layout, dtype, largest):
    if layout_of_machine().reduce_range and not layout.reduce_range:
        pytest.skip("this machine has no VNNI: sums of products of 8-bit weights overflow, and the file is not kept")
    export_quantised(small, tmp_path / "q.onnx", replace(wanted("int8", layout), compared=same_class(small)))
    graph = onnx.load(tmp_path / "q.onnx").graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    zeros = [arrays[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {zero.dtype for zero in zeros} == {np.dtype(dtype)}
    if layout.symmetric:
        assert not any(zero.any() for zero in zeros)
    weights = [array for name, array in arrays.items() if name.endswith("_quantized") and array.dtype == np.int8]
    assert {int(np.abs(array.astype(int)).max()) for array in weights} == {largest}


def test_fp16_keeps_its_weights_in_fp16(small, tmp_path):
    export_quantised(small, tmp_path / "q.onnx", replace(wanted("fp16"), compared=same_class(small)))
    graph = onnx.load(tmp_path / "q.onnx").graph
    assert {tensor.data_type for tensor in graph.initializer if tensor.data_type != TensorProto.INT64} == {
        TensorProto.FLOAT16
    }
    assert [node.op_type for node in graph.node].count("Cast") == 2


SCRIPT = """
import sys
from pathlib import Path
from cahfp_cli.data.spec import load_data
from cahfp_cli.export.int8_layout import Int8Layout
from cahfp_cli.export.quantised import Quantisation, export_quantised
source, target, dtype = sys.argv[1:]
data = load_data("digits@test")
export_quantised(Path(source), Path(target), Quantisation(dtype, data.x, data, True, Int8Layout("uint8")))
"""


@pytest.mark.parametrize("source", ["resnet20", "vit"], indirect=True)
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_two_processes_write_the_same_bytes_and_leave_nothing(source, tmp_path, dtype):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    paths = [tmp_path / name for name in ("first.onnx", "second.onnx")]
    for number, path in enumerate(paths):
        env = {**os.environ, "TMPDIR": str(scratch), "PYTHONHASHSEED": str(number)}
        command = [sys.executable, "-c", SCRIPT, str(source), str(path), dtype]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["first.onnx", "scratch", "second.onnx"]
    assert {entry.name for entry in scratch.iterdir()} <= {".ses"}  # ONNX Runtime writes it when it is imported
    assert [entry.name for entry in source.parent.iterdir()] == ["model.onnx"]


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary files go, to see that none stays."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def spoilt(monkeypatch, function, change):
    """Let the converter's result be changed before it is written."""
    whole = getattr(quantised, function)

    def tampered(*arguments):
        proto = whole(*arguments)
        change(proto)
        return proto

    monkeypatch.setattr(quantised, function, tampered)


def set_scales(value):
    def change(proto):
        for tensor in proto.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT and tensor.name.endswith("_scale"):
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(np.full_like(array, value), tensor.name))

    return change


def rename_operator(proto):
    proto.graph.node[-1].op_type = "Nonsense"


@pytest.mark.parametrize(
    ("change", "message"),
    [(set_scales(np.nan), "gives NaN or Inf for"), (set_scales(1e-9), "in the class that the fp32 file does"),
     (rename_operator, "ONNX Runtime does not load it")],
    ids=["NaN", "another network", "no network"],
)  # fmt: skip
def test_a_bad_file_is_not_kept(source, tmp_path, scratch, monkeypatch, change, message):
    spoilt(monkeypatch, "to_int8", change)
    with pytest.raises(VerificationError, match=message):
        export_quantised(source, tmp_path / "q.onnx", wanted("int8"))
    assert not (tmp_path / "q.onnx").exists()
    assert list(scratch.iterdir()) == []


def test_a_converter_that_fails_halfway_leaves_nothing(small, tmp_path, scratch, monkeypatch):
    def fails(self):
        assert list(scratch.iterdir())  # the augmented network is there by now
        raise RuntimeError("no more")

    monkeypatch.setattr(CalibrationReader, "get_next", fails)
    for dtype in ("int8", "fp16"):
        with pytest.raises(VerificationError, match=f"cannot be converted to {dtype}: no more"):
            export_quantised(small, tmp_path / "q.onnx", wanted(dtype))
    assert [entry.name for entry in tmp_path.iterdir()] == ["scratch"]
    assert list(scratch.iterdir()) == []


def test_activations_beyond_fp16_are_refused_though_this_cpu_computes_them_in_float32(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        model[0].weight.mul_(1e6)
        model[3].weight.mul_(1e-6)
    export_onnx(model.eval(), SHAPE, tmp_path / "model.onnx", METADATA)
    with pytest.raises(VerificationError, match="more than the 65504 that fp16 holds"):
        export_quantised(tmp_path / "model.onnx", tmp_path / "q.onnx", wanted("fp16"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(("samples", "sizes"), [(5, [1] * 5), (40, [3] * 13 + [1]), (5000, [64] * 16)])
def test_calibration_takes_at_most_1024_samples_in_16_batches(samples, sizes):
    reader, found = CalibrationReader(np.arange(samples)), []
    while (batch := reader.get_next()) is not None:
        found.append(batch["input"])
    assert [len(batch) for batch in found] == sizes
    np.testing.assert_array_equal(np.concatenate(found), np.arange(min(samples, 1024)))


@pytest.mark.parametrize(
    ("machine", "flags", "layout"),
    [
        ("x86_64", "fpu avx2 avx512_vnni", Int8Layout("uint8")),
        ("AMD64", "fpu avx2 avx_vnni", Int8Layout("uint8")),
        ("x86_64", "fpu avx2 avx512f", Int8Layout("uint8", reduce_range=True)),
        ("x86_64", None, Int8Layout("uint8", reduce_range=True)),
        ("aarch64", "fp asimd", Int8Layout("int8")),
        ("arm64", None, Int8Layout("int8")),
    ],
)
def test_layout_of_a_machine(tmp_path, monkeypatch, machine, flags, layout):
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: avx_vnni\nflags\t\t: {flags}\n")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    assert layout_of_machine() == layout
    assert processor.has_vnni() == bool(flags and "vnni" in flags)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("intel-n100", Int8Layout("uint8")),
        ("raspberry-pi-5", Int8Layout("int8")),
        ("stm32h743", Int8Layout("int8")),
        ("jetson-orin-nano", Int8Layout("int8", symmetric=True)),
    ],
)
def test_layout_of_a_profile(name, layout):
    runtime = load_profile(name).runtime
    assert layout_for(runtime.architecture, runtime.provider) == layout


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_graphs_whose_shapes_are_not_inferred_are_converted_all_the_same(tmp_path, dtype):
    class Fourier(nn.Module):
        """Filters in frequency; ONNX Runtime's shape inference gives up at its DFT."""

        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 10)
            self.filter = nn.Parameter(torch.randn(8, 8, 5, 2) * 0.2)

        def forward(self, x):
            x = self.conv(x)
            x = x + torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(self.filter), s=(8, 8))
            return self.head(torch.relu(x).mean((2, 3)))

    source = tmp_path / "model.onnx"
    torch.manual_seed(0)
    export_onnx(Fourier().eval(), SHAPE, source, METADATA)
    test = load_data("digits@test")
    one = replace(wanted(dtype, layout_of_machine()), compared=replace(test, x=test.x[:1], y=test.y[:1]))
    export_quantised(source, tmp_path / "q.onnx", one)
    nodes = [node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node]
    assert "DFT" in nodes
    assert dtype == "fp16" or "QuantizeLinear" in nodes
