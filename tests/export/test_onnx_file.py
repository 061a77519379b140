"""ONNX files: the network's own results, self-contained, free of the machine they were made on, or no file."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn import functional as F

from cahfp_cli.coupling.analysis import cut
from cahfp_cli.errors import VerificationError
from cahfp_cli.export import onnx_file
from cahfp_cli.export.onnx_file import export_onnx
from tests.support.networks import IMAGE, Attention, Layer, VisionTransformer, examples, masks, networks

METADATA = {"cahfp.checkpoint": "0" * 64, "cahfp.tool": "cahfp 0"}


def run(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input": x.numpy()})[0]


@given(network=networks(), mask=masks)
@examples(6)
def test_onnx_equals_torch_at_any_batch(tmp_path_factory, network, mask):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    analysis = network.analyse()
    compact = cut(network.model, analysis, mask.of(analysis.groups))[0]
    exported = export_onnx(compact, network.input_shape, path, METADATA)
    assert exported.size == path.stat().st_size
    assert exported.parity <= 1e-4
    for batch in (1, 5, 2):
        x = network.samples(batch)
        with torch.no_grad():
            expected = compact(x).numpy()
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(run(path, x) / scale, expected / scale, rtol=0, atol=1e-4)


def small(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module", params=["convolutions", "transformer"])
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    torch.manual_seed(0)
    attention = Layer(4, Attention(4, 2, 2, True, True), 3, True)
    model = small() if request.param == "convolutions" else VisionTransformer(4, [attention]).eval()
    export_onnx(model, IMAGE, path, METADATA)
    return path


def test_the_file_is_one_and_its_batch_is_free(file):
    assert [entry.name for entry in file.parent.iterdir()] == ["model.onnx"]
    proto = onnx.load(file, load_external_data=False)
    onnx.checker.check_model(proto, full_check=True)
    assert all(not tensor.external_data for tensor in proto.graph.initializer)
    for value in (proto.graph.input[0], proto.graph.output[0]):
        first, *rest = value.type.tensor_type.shape.dim
        assert first.dim_param == "batch"
        assert all(axis.HasField("dim_value") for axis in rest)


def test_the_file_says_only_what_we_let_it_say(file):
    proto = onnx.load(file)
    assert {entry.key: entry.value for entry in proto.metadata_props} == METADATA
    described = [proto, proto.graph, *proto.functions, *proto.graph.node]
    described += [*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer]
    described += [node for function in proto.functions for node in function.node]
    assert not any(entry.doc_string for entry in described)
    assert not any(entry.metadata_props for entry in described[1:])
    content = file.read_bytes()
    here = Path(__file__).resolve()
    for private in (str(here.parents[2]), str(Path.home()) + "/", sys.prefix, "site-packages", ".py", "Traceback"):
        assert private.encode() not in content


SCRIPT = """
import sys, torch
from pathlib import Path
from torch import nn
from torch.nn import functional as F
from cahfp_cli.export.onnx_file import export_onnx
torch.manual_seed(0)
layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
export_onnx(nn.Sequential(*layers).eval(), (2, 6, 6), Path(sys.argv[1]), {"b": "2", "a": "1"})
"""


def test_two_processes_write_the_same_bytes(tmp_path):
    paths = [tmp_path / name for name in ("first.onnx", "second.onnx")]
    running = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(p)], stdout=subprocess.PIPE) for p in paths]
    for process in running:
        assert process.communicate()[0] == b""  # standard output belongs to results
        assert process.returncode == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("change", ["a weight", "NaN", "shape"])
def test_a_file_that_differs_from_the_network_is_not_kept(tmp_path, monkeypatch, change):
    whole = onnx_file.cleaned

    def tampered(proto, metadata):
        proto = whole(proto, metadata)
        weight = next(t for t in proto.graph.initializer if onnx.numpy_helper.to_array(t).shape[-1:] == (4,))
        array = onnx.numpy_helper.to_array(weight).copy()
        array.flat[0] = np.nan if change == "NaN" else array.flat[0] + 1e-2
        weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
        return proto

    monkeypatch.setattr(onnx_file, "cleaned", tampered)
    if change == "shape":
        monkeypatch.setattr(onnx_file, "cleaned", whole)
        monkeypatch.setattr(onnx_file, "named_outputs", lambda output: {"logits": output[:, :1]})
    with pytest.raises(VerificationError, match=r"differs from the network by|gives shape"):
        export_onnx(small(), IMAGE, tmp_path / "model.onnx", METADATA)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_expressed_is_refused_in_one_line(tmp_path):
    class Stubborn(nn.Module):
        def forward(self, x):
            if x.mean().item() > 0:
                x = x + 1
            return x.flatten(1)

    with pytest.raises(VerificationError, match="cannot be exported to ONNX") as error:
        export_onnx(Stubborn(), IMAGE, tmp_path / "model.onnx", METADATA)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reshape", [lambda x: x.flatten(1), lambda x: x.reshape(len(x), -1)])
def test_a_batch_counted_in_python_stays_free(tmp_path, reshape):
    class Counted(nn.Module):
        def forward(self, x):
            return reshape(x)[:, :3] * 2

    assert export_onnx(Counted(), IMAGE, tmp_path / "model.onnx", METADATA).parity <= 1e-4
    assert run(tmp_path / "model.onnx", torch.rand(7, *IMAGE)).shape == (7, 3)


def test_a_network_for_one_batch_size_is_refused(tmp_path):
    class Pair(nn.Module):
        def forward(self, x):
            return x.reshape(2, 72)[:, :3]

    with pytest.raises(VerificationError, match="batch"):
        export_onnx(Pair(), IMAGE, tmp_path / "model.onnx", METADATA)
    assert list(tmp_path.iterdir()) == []


def test_export_leaves_the_network_and_the_random_state_alone(tmp_path):
    model = small()
    before, state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    export_onnx(model, IMAGE, tmp_path / "model.onnx", METADATA)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


class Pooled(nn.Module):
    """Pools to sizes that do not divide the image's, which ONNX has no operator for."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        return self.pool(x).flatten(1)


POOLS = {
    "2d": lambda x: F.adaptive_max_pool2d(x, (4, 5)),
    "1d": lambda x: F.adaptive_max_pool1d(x.flatten(2), 5),
    "3d": lambda x: F.adaptive_max_pool3d(x[:, None], (1, 4, 5)) + F.adaptive_avg_pool3d(x[:, None], (1, 4, 5)),
    "indices": lambda x: F.adaptive_max_pool2d(x, (4, 5), return_indices=True)[1].float(),
    "distances": lambda x: torch.cdist(x.flatten(2), x.flatten(2) + 1),
}


@pytest.mark.parametrize("pool", POOLS)
def test_operators_that_the_exporter_does_not_know_are_said_in_others(tmp_path, pool):
    assert export_onnx(Pooled(POOLS[pool]), IMAGE, tmp_path / "model.onnx", METADATA).parity <= 1e-4
    x = torch.rand(3, *IMAGE)
    np.testing.assert_allclose(run(tmp_path / "model.onnx", x), POOLS[pool](x).flatten(1).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("function", "name"),
    [(lambda x: torch.linalg.inv(x + 9 * torch.eye(6)), "linalg_inv_ex"), (lambda x: x.cumprod(1), "prod")],
)
def test_a_refusal_names_the_operator_and_the_way_out_in_plain_text(tmp_path, function, name):
    with pytest.raises(VerificationError, match=rf"\w+\.{name}\b.*--no-onnx") as error:
        export_onnx(Pooled(function), IMAGE, tmp_path / "model.onnx", METADATA)
    assert str(error.value).isprintable()  # no escape codes, no second line
