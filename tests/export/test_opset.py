"""The opset that was asked for, the lowest IR version that it needs, and the same results in each."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cahfp_cli.errors import VerificationError
from cahfp_cli.export.onnx_file import ExportOptions, export_onnx
from cahfp_cli.export.opset import HIGHEST, LOWEST, at_opset, lowest_ir

IR = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9}
"""https://github.com/onnx/onnx/blob/main/docs/Versioning.md#released-versions"""


class Varied(nn.Module):
    """What ordinary networks hold, of operators that changed between the opsets."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.layer = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.LayerNorm([6, 6])
        self.recurrent, self.head = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        x = self.layer(F.hardswish(self.norm(self.conv(x))) + F.mish(x.mean((2, 3), keepdim=True).sum(1, keepdim=True)))
        a, b = x.split(3, 1)
        x = F.leaky_relu(F.interpolate(F.pad(a * b.std((2, 3), keepdim=True), (1, 1, 1, 1)), scale_factor=0.75))
        return self.head(self.recurrent(F.relu(x).amax(1).reshape(len(x), -1, 6))[0][:, -1])


def opset_and_ir(path):
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [entry.domain for entry in proto.opset_import] == [""]
    return proto.opset_import[0].version, proto.ir_version


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The network's file in the exporter's own opset."""
    torch.manual_seed(0)
    network, path = Varied().eval(), tmp_path_factory.mktemp("opset") / "m.onnx"
    export_onnx(network, (2, 6, 6), path, {})
    return network, path


def test_files_have_the_lowest_ir_version_that_their_opset_needs(whole):
    assert opset_and_ir(whole[1]) == (18, 8)  # ONNX Runtime 1.17 and older take no more than 9


@pytest.mark.parametrize("opset", range(LOWEST, HIGHEST + 1))
def test_every_opset_gives_the_same_results(whole, tmp_path, opset):
    network, path = whole
    proto = at_opset(onnx.load(path), opset)
    proto.ir_version = lowest_ir(proto)
    onnx.save(proto, tmp_path / "m.onnx")
    assert opset_and_ir(tmp_path / "m.onnx") == (opset, IR[opset])
    x = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], network(x).numpy(), atol=1e-5)


class Grid(nn.Module):
    def forward(self, x):
        return F.grid_sample(x, torch.zeros(x.shape[0], 3, 3, 2), align_corners=False).flatten(1)


class Fourier(nn.Module):
    def forward(self, x):
        return torch.fft.rfft(x.flatten(1)).abs()


@pytest.mark.parametrize(("make", "nearest", "operator"), [(Grid, 16, "GridSample"), (Fourier, 17, "DFT")])
def test_an_opset_without_an_operator_is_refused_and_the_nearest_is_named_and_works(tmp_path, make, nearest, operator):
    path = tmp_path / "m.onnx"
    with pytest.raises(VerificationError, match=rf"opset 13, which has no {operator} .* --opset {nearest}$"):
        export_onnx(make(), (2, 4, 4), path, {}, options=ExportOptions(opset=13))
    assert list(tmp_path.iterdir()) == []
    for opset in (nearest, 20):
        assert export_onnx(make(), (2, 4, 4), path, {}, options=ExportOptions(opset=opset)).parity <= 1e-4
        assert opset_and_ir(path) == (opset, IR[opset])
