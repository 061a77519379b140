"""Every output of a network is in its ONNX file under a name that says where it was, and equals torch's."""

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from cahfp_cli.coupling.analysis import analyse
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.errors import VerificationError
from cahfp_cli.export.onnx_file import ExportOptions, export_onnx
from cahfp_cli.export.outputs import left_out, named_outputs
from cahfp_cli.running.evaluation import evaluate, evaluate_onnx

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Described:
    logits: torch.Tensor
    hidden: tuple
    note: str


class Heads(nn.Module):
    """Two layers of a shared input, put together by `combine(a, b, x)`."""

    def __init__(self, combine):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.combine = nn.Linear(6, 3), nn.Linear(6, 4), combine

    def forward(self, x):
        return self.combine(self.a(x), self.b(x), x)


def headless(a, b, x):
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(last_hidden_state=torch.stack([a, 2 * a], 1), pooler_output=b)


SHAPES = {
    "nested": (lambda a, b, x: [a, (b, {"deep": 2 * b})], {"logits": 0, "output_1_0": 1, "output_1_1_deep": 2}),
    "dict": (lambda a, b, x: {"aux out": b, "logits": a}, {"logits": 0, "aux_out": 1}),
    "no logits": (lambda a, b, x: {"out": a, "aux": b}, {"out": 0, "aux": 1}),
    "named tuple": (Pair, {"logits": 0, "second": 1}),
    "object": (lambda a, b, x: Described(a, (b, None, x), "said"), {"logits": 0, "hidden_0": 1, "hidden_2": "x"}),
    "twice": (lambda a, b, x: (a, b, b, x), {"logits": 0, "output_1": 1, "output_2": 1, "output_3": "x"}),
    "names that meet": (lambda a, b, x: {"a_0": a, "a": [b], "input": 2 * b}, {"a_0": 0, "a_0_2": 1, "input_2": 2}),
    "transformers": (headless, {"logits": 3, "last_hidden_state": 4, "pooler_output": 1}),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_every_output_is_in_the_file_by_its_name(tmp_path, kind):
    if kind == "transformers":
        pytest.importorskip("transformers")
    combine, expected = SHAPES[kind]
    network, path = Heads(combine if kind != "named tuple" else lambda a, b, x: Pair(a, b)).eval(), tmp_path / "m.onnx"
    exported = export_onnx(network, (6,), path, {})
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert names == list(expected) == list(exported.outputs)
    x = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = network.a(x), network.b(x)
    values = {0: a, 1: b, 2: 2 * b, 3: 1.5 * a, 4: torch.stack([a, 2 * a], 1), "x": x}
    for name, found in zip(names, session.run(None, {"input": x.numpy()}), strict=True):
        np.testing.assert_allclose(found, values[expected[name]].numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_evaluation_of_a_file_finds_the_logits_among_several_outputs(tmp_path):
    network = Heads(lambda a, b, x: {"aux": b, "logits": a}).eval()
    rng = np.random.default_rng(0)
    data = Dataset(rng.random((40, 6), np.float32), rng.integers(0, 3, 40), 3, "random")
    export_onnx(network, (6,), tmp_path / "m.onnx", {})
    ours, theirs = evaluate_onnx(tmp_path / "m.onnx", data, 16), evaluate(network, data, 16, torch.device("cpu"))
    assert ours.accuracy == theirs.accuracy
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)


def test_parity_is_of_all_outputs(tmp_path, monkeypatch):
    """A second output that the file does not give as torch does keeps the file from being written, and is named."""

    class Unlike(nn.Module):
        def forward(self, x):
            return x[:, :2], x + (0.0 if torch.compiler.is_exporting() else 1.0)

    with pytest.raises(VerificationError, match="in the output output_1"):
        export_onnx(Unlike(), (6,), tmp_path / "m.onnx", {})
    assert list(tmp_path.iterdir()) == []


def test_what_no_file_can_hold_is_named():
    class Cache:
        def __init__(self):
            self.layers = [torch.zeros(1)]

    output = {"logits": torch.zeros(2, 3), "past": Cache(), "scale": 2.0, "nothing": None}
    assert list(named_outputs(output)) == ["logits"]
    assert left_out(output) == ["past", "scale"]


@pytest.mark.parametrize("name", ["code", "graph", "logits", "input"])
def test_names_of_layers_and_weights_do_not_matter(tmp_path, name):
    """`code` and `graph` are attributes of what the exporter makes of a network, `logits` and `input` names in it."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            if name in ("code", "graph"):
                setattr(self, name, nn.Linear(6, 6))
            else:
                self.register_parameter(name, nn.Parameter(torch.rand(6, 6)))

        def forward(self, x):
            layer = getattr(self, name)
            weight = getattr(layer, "weight", layer)
            return nn.functional.linear(torch.tanh(nn.functional.linear(x, weight)), weight.t())  # read twice

    assert export_onnx(Named().eval(), (6,), tmp_path / "m.onnx", {}).outputs == ("logits",)


class Masked(nn.Module):
    """Ignores samples' zeros, so that one without any other number has a mean of nothing, as a padded one has."""

    def forward(self, x):
        real = x >= 2
        return (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True) * torch.ones(3)


def test_files_are_compared_on_real_samples_where_there_are_any(tmp_path):
    with pytest.raises(VerificationError, match=r"no finite number.*\n.*--calibration or --data.*--no-onnx"):
        export_onnx(Masked(), (4,), tmp_path / "m.onnx", {})
    real = np.full((8, 4), 3, np.float32)
    exported = export_onnx(Masked(), (4,), tmp_path / "m.onnx", {}, options=ExportOptions(samples=real))
    assert exported.parity <= 1e-6


def test_the_seed_says_which_samples_are_compared(tmp_path, monkeypatch):
    seen = []

    class Seen(nn.Module):
        def forward(self, x):
            if not torch.compiler.is_exporting():
                seen.append(x.tolist())
            return x * 2

    def compared(seed, samples):
        seen.clear()
        export_onnx(Seen(), (4,), tmp_path / "m.onnx", {}, options=ExportOptions(samples, seed))
        return list(seen)

    rows = np.random.default_rng(0).random((50, 4), np.float32)
    for samples in (None, rows):
        assert compared(1, samples) == compared(1, samples) != compared(2, samples)
    assert all(row in rows.tolist() for batch in seen for row in batch)


def test_a_network_that_draws_numbers_is_refused_by_that(tmp_path):
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    with pytest.raises(VerificationError, match=r"draws random numbers \(RandomNormalLike\).*--no-onnx"):
        export_onnx(Noisy(), (4,), tmp_path / "m.onnx", {})


def test_outputs_of_objects_keep_their_width_in_the_groups():
    """What is exported is what counts as output: its channels are no group's."""
    network = Heads(lambda a, b, x: Described(a, (b, None, x), "said")).eval()
    assert analyse(network, (6,)).groups.count == 0
