"""Recurrent layers, Fourier transforms, attention in one piece and unusual products: costs, counted independently."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cahfp_cli.coupling.analysis import analyse
from cahfp_cli.device.catalogue import load_profile
from cahfp_cli.device.cost import CostModel, compile_workload
from cahfp_cli.device.derived import derived
from cahfp_cli.device.workload import make_workload

pytestmark = pytest.mark.quick

PI = load_profile("raspberry-pi-4")


class Recurrent(nn.Module):
    """A convolution along the steps gives the features, so that the recurrent layer's input can be pruned."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.stem, self.layer = nn.Linear(6, features), layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.layer(x if self.layer.batch_first else x.transpose(0, 1))[0].flatten(1)


class Plain(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x * 1.5).flatten(1)  # type: ignore[operator]


def model_of(network: nn.Module, shape: tuple[int, ...]) -> tuple[CostModel, object]:
    analysis = analyse(network, shape)
    itemsizes = {name: tensor.element_size() for name, tensor in network.state_dict().items()}
    return compile_workload(make_workload(analysis, itemsizes), PI), analysis


def macs_of_layer(kind: str, steps: int, features: int, hidden: int, layers: int, both: bool, projected: int) -> int:
    """Step by step and gate by gate, as the textbook has it."""
    gates, macs = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], 0
    for layer in range(layers):
        for _ in range(1 + both):
            given = projected or hidden
            entering = features if layer == 0 else given * (1 + both)
            for _ in range(steps):
                macs += gates * hidden * (entering + given) + projected * hidden
    return macs


KINDS = {
    "LSTM": ("LSTM", {}),
    "deep LSTM": ("LSTM", {"num_layers": 3, "batch_first": True}),
    "LSTM both ways": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "projected LSTM": ("LSTM", {"num_layers": 2, "proj_size": 5, "batch_first": True}),
    "GRU both ways": ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}),
    "RNN": ("RNN", {"nonlinearity": "relu"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [False, True])
def test_recurrent_layers_are_counted_gate_by_gate_and_step_by_step(kind: str, cut: bool) -> None:
    name, options = KINDS[kind]
    steps, features, hidden = 11, 12, 9
    network = Recurrent(getattr(nn, name)(features, hidden, **options), features).eval()
    model, _ = model_of(network, (steps, 6))
    widths = np.array(model.full_widths)
    assert widths.tolist() == [features]
    kept = 7 if cut else features
    arguments = (options.get("num_layers", 1), options.get("bidirectional", False), options.get("proj_size", 0))
    expected = macs_of_layer(name, steps, kept, hidden, *arguments) + steps * 6 * kept
    assert model.cost(np.array([kept])).macs == expected


def test_steps_take_time_one_after_the_other() -> None:
    """Twice the steps take twice as long, also in training; more than the peak rate for their products."""
    seconds = []
    for steps in (50, 100):
        model, _ = model_of(Recurrent(nn.LSTM(64, 256, 2, batch_first=True), 64).eval(), (steps, 6))
        cost = model.cost(model.full_widths)
        assert cost.latency_seconds is not None
        assert float(cost.latency_seconds) >= 2 * float(cost.macs) / PI.compute.fp32.reached
        assert derived(cost, PI).training_step_seconds == pytest.approx(3 * float(cost.latency_seconds))
        seconds.append(float(cost.latency_seconds))
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=0.1)


HELD = {
    "LSTM": (nn.LSTM, 64, 128, 100, {}, 340224),
    "two layers": (nn.LSTM, 64, 128, 100, {"num_layers": 2}, 341248),
    "both ways": (nn.LSTM, 64, 128, 100, {"num_layers": 2, "bidirectional": True}, 809984),
    "GRU": (nn.GRU, 64, 128, 100, {}, 287488),
    "GRU both ways": (nn.GRU, 64, 128, 100, {"num_layers": 2, "bidirectional": True}, 704512),
    "RNN": (nn.RNN, 64, 128, 100, {}, 129280),
    "wide": (nn.LSTM, 64, 512, 20, {}, 278272),
}
"""Bytes that ONNX Runtime 1.32 held for the exported layer, measured by scripts/bench_memory.py's way (`exact`)."""


@pytest.mark.parametrize("kind", HELD)
def test_the_gates_of_all_steps_are_held_in_memory(kind: str) -> None:
    make, features, hidden, steps, options, measured = HELD[kind]
    network = Last(make(features, hidden, batch_first=True, **options)).eval()
    model, _ = model_of(network, (steps, features))
    held = float(model.cost(model.full_widths).activation_bytes) - 4 * steps * features
    assert held == pytest.approx(measured, rel=0.05)


class Last(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0][:, -1])


def flash(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0]


def fourier(points: int, lines: int, real: bool) -> float:
    """The operations of a fast transform, 5 n log2 n, half of them multiply-accumulates; of real numbers, half."""
    return lines * points * math.log2(points) * 2.5 / (2 if real else 1)


PRODUCTS = {
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), (2, 5, 6), 2 * 2 * 5 * 5 * 6),
    "one kernel": (flash, (2, 5, 6), 2 * 2 * 5 * 5 * 6),
    "einsum": (lambda x: torch.einsum("bchw,bdhw->bcd", x, x), (4, 3, 5), 4 * 4 * 15),
    "vector": (lambda x: (x @ torch.ones(6, device=x.device))[:, None], (5, 6), 5 * 6),
    "distances": (lambda x: torch.cdist(x, x), (5, 6), 5 * 5 * 6),
    "transform": (lambda x: torch.fft.fft(x + 0j).abs(), (4, 64), fourier(64, 4, False)),
    "real transforms": (lambda x: torch.fft.irfft(torch.fft.rfft(x)), (4, 64), 2 * fourier(64, 4, True)),
}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_other_products_are_counted(kind: str) -> None:
    function, shape, expected = PRODUCTS[kind]
    model, _ = model_of(Plain(function).eval(), shape)
    assert float(model.full.macs) == pytest.approx(expected, rel=0.1 if "transform" in kind else 0)
    assert model.workload.unmodelled == ()


def test_three_factors_are_counted() -> None:
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Bilinear(4, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x, x)

    assert float(model_of(Bilinear().eval(), (4,))[0].full.macs) == 3 * 4 * 4


def test_cumulative_operators_compute_and_what_is_not_modelled_is_named() -> None:
    model, _ = model_of(Plain(lambda x: x.cumsum(1) + x.logcumsumexp(1)).eval(), (64,))
    kinds = {operator.name.partition(".")[0]: operator.kind for operator in model.workload.operators}
    assert kinds["cumsum"] == kinds["logcumsumexp"] == "math"
    assert model.workload.unmodelled == ()
    model, _ = model_of(Plain(lambda x: torch.linalg.inv(x) + x.sort(1)[0]).eval(), (4, 4))
    assert model.workload.unmodelled == ("linalg_inv_ex", "sort")
