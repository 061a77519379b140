"""Gate statistics against explicit gate parameters and autograd's own Jacobians and Hessians, in float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from cahfp_cli.coupling.analysis import analyse
from cahfp_cli.coupling.slicing import tensors_of
from cahfp_cli.errors import InputError
from cahfp_cli.significance.gates import gate_statistics
from tests.networks import Attention, Layer, Residual, VisionTransformer, masked, randomise

Flat = nn.Flatten


class Grouped(nn.Module):
    """A stem, a grouped convolution that loses positions, a depthwise one, a head on the flattened image."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.grouped, self.depthwise = nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(4, 8, 3, groups=4)
        self.head = nn.Linear(8 * 4, 3)

    def forward(self, x):
        return self.head(self.depthwise(torch.tanh(self.grouped(torch.relu(self.norm(self.stem(x)))))).flatten(1))


class SequenceFirst(nn.Module):
    """Tokens before samples, as many recurrent and transformer codes have them; as many tokens as samples."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.head((x + self.b(torch.tanh(self.a(x)))).mean(0))


class Flattened(SequenceFirst):
    """The same with tokens and samples in one axis."""

    def forward(self, x):
        b, n, _ = x.shape
        x = x.transpose(0, 1).reshape(n * b, -1)
        return self.head((x + self.b(torch.tanh(self.a(x)))).reshape(n, b, -1).mean(0))


class Transposed(nn.Module):
    """A product with a transposed parameter, a tied weight, an output that no loss sees."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head, self.unused = (nn.Linear(5, 5) for _ in range(5))
        self.c.weight = self.b.weight

    def forward(self, x):
        x = torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x))))))
        return x @ self.head.weight.t(), self.unused(x)


def stream():
    block = [Residual(nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)))]
    block += [Residual(nn.Sequential(nn.Conv2d(4, 2, 1), nn.SiLU(), nn.Conv2d(2, 4, 1)))]
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), *block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def transformer(normed):
    return VisionTransformer(4, [Layer(4, Attention(4, 3, 2, packed, False), 5, normed) for packed in (True, False)])


NETWORKS = {
    "convolutions, grouped and depthwise": (Grouped, (2, 6, 6)),
    "residual stream": (stream, (2, 6, 6)),
    "transposed convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2), nn.Flatten(), nn.Linear(75, 3)
        ),
        (2, 6, 6),
    ),
    "attention heads": (lambda: transformer(False), (2, 6, 6)),
    "attention heads behind norms": (lambda: transformer(True), (2, 6, 6)),
    "tokens before samples": (SequenceFirst, (6, 4)),
    "tokens and samples in one axis": (Flattened, (6, 4)),
    "tied and transposed weights": (Transposed, (5,)),
}
SAMPLES = 6


def prepared(name):
    torch.manual_seed(3)
    factory, shape = NETWORKS[name]
    model = factory()
    randomise(model)
    model = model.double().eval()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(SAMPLES, *shape)), rng.integers(0, 3, SAMPLES)
    return model, analyse(model, shape, torch.float64).groups, x, y


def logits_of_gates(model, groups, x):
    """Logits of one sample as a function of the gates, which scale the consumers' weights along the contracted axis:
    W (z a) = (W z) a."""
    tensors = tensors_of(model)

    def logits(z):
        gates = torch.cat([z, z.new_ones(1)])
        scaled = {}
        for name, axis in {(consumer.tensor, consumer.axis) for consumer in groups.consumers}:
            weight = tensors[name]
            shape = [-1 if i == axis else 1 for i in range(weight.dim())]
            gate = gates[torch.from_numpy(groups.labels[name][axis])]
            scaled[name] = weight.detach() * gate.reshape(shape)
        output = functional_call(model, scaled, (x[None],))
        return (output[0] if isinstance(output, tuple) else output)[0]

    return logits


def reference(model, groups, x, y):
    """Per-sample gate gradients (n, groups), Gauss-Newton diagonals (n, groups) and losses (n,)."""
    ones = torch.ones(groups.count, dtype=torch.float64)
    rows = []
    for sample, label in zip(torch.from_numpy(x), y, strict=True):
        logits = logits_of_gates(model, groups, sample)
        jacobian = torch.autograd.functional.jacobian(logits, ones)
        p = logits(ones).detach().softmax(0)
        ggn = jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
        gradient = jacobian.T @ (p - nn.functional.one_hot(torch.tensor(label), len(p)))
        rows.append((gradient, ggn.diagonal(), -p.log()[label]))
    return [torch.stack(column).numpy() for column in zip(*rows, strict=True)]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_gates_equal_explicit_gate_parameters(name):
    model, groups, x, y = prepared(name)
    gradient, ggn, losses = reference(model, groups, x, y)
    assert groups.count > 0
    found = gate_statistics(model, groups, x, y, batch_size=SAMPLES)
    close(found.gradient, gradient.mean(0))
    close(found.gradient_magnitude, np.abs(gradient).mean(0))
    close(found.gradient_square, (gradient**2).mean(0))
    close(found.curvature, ggn.mean(0))
    assert found.loss == pytest.approx(losses.mean(), rel=1e-6)
    drawn = gate_statistics(model, groups, x, y, batch_size=SAMPLES, draws=2)
    close(drawn.gradient, gradient.mean(0))
    close(drawn.gradient_square, (gradient**2).mean(0))


@pytest.mark.parametrize("name", ["residual stream", "tied and transposed weights"])
def test_results_do_not_depend_on_the_batch_size(name):
    model, groups, x, y = prepared(name)
    one, four = (gate_statistics(model, groups, x, y, batch_size=size) for size in (1, 4))
    for field in ("gradient", "gradient_magnitude", "gradient_square", "curvature"):
        np.testing.assert_allclose(getattr(one, field), getattr(four, field), rtol=1e-9, atol=1e-12)


def test_a_gate_at_zero_is_the_model_without_the_group():
    model, groups, x, _ = prepared("residual stream")
    for number in range(groups.count):
        kept = np.arange(groups.count) != number
        gated = logits_of_gates(model, groups, torch.from_numpy(x[0]))(torch.from_numpy(kept.astype(np.float64)))
        with torch.no_grad():
            expected = masked(model, groups, kept)(torch.from_numpy(x[:1]))[0]
        np.testing.assert_allclose(gated.detach().numpy(), expected.numpy(), atol=1e-12)


def linear_softmax():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double().eval()
    rng = np.random.default_rng(1)
    return model, analyse(model, (4,), torch.float64).groups, rng.normal(size=(40, 4)), rng.integers(0, 3, 40)


def test_curvature_is_the_hessian_where_logits_are_linear_in_the_gates():
    model, groups, x, y = linear_softmax()
    first, second = (layer.weight.detach().numpy() for layer in model)
    hidden = x @ first.T + model[0].bias.detach().numpy()
    logits = hidden @ second.T + model[1].bias.detach().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = groups.labels["0.weight"][0]
    jacobian = np.zeros((40, 3, 5))
    jacobian[:, :, order] = hidden[:, None, :] * second[None]
    hessian = np.einsum(
        "bkg,bkl,blg->g", jacobian, np.einsum("bk,kl->bkl", p, np.eye(3)) - p[:, :, None] * p[:, None], jacobian
    )
    found = gate_statistics(model, groups, x, y)
    np.testing.assert_allclose(found.curvature, hessian / 40, rtol=1e-9)

    def loss(z):
        return nn.functional.cross_entropy(
            torch.from_numpy(logits) + torch.einsum("bkg,g->bk", torch.from_numpy(jacobian), z - 1), torch.from_numpy(y)
        )

    ones = torch.ones(5, dtype=torch.float64)
    autograd = torch.autograd.functional.hessian(loss, ones).diagonal().numpy()
    np.testing.assert_allclose(found.curvature, autograd, rtol=1e-9)
    np.testing.assert_allclose(found.gradient, torch.autograd.functional.jacobian(loss, ones).numpy(), rtol=1e-9)


def test_draws_converge_to_the_exact_curvature_at_the_rate_of_a_mean():
    model, groups, x, y = linear_softmax()
    exact = gate_statistics(model, groups, x, y).curvature

    def error(draws):
        runs = [gate_statistics(model, groups, x, y, draws=draws, seed=seed).curvature for seed in range(12)]
        return np.mean(runs, 0), np.std(runs, 0)

    (_, few), (mean, many) = error(4), error(64)
    assert (np.abs(mean - exact) < 5 * many / np.sqrt(12)).all()  # unbiased
    assert 2.5 < np.mean(few / many) < 6  # 16 times the draws: a quarter of the deviation


def test_draws_follow_the_seed_and_nothing_else_does():
    model, groups, x, y = prepared("convolutions, grouped and depthwise")
    runs = [gate_statistics(model, groups, x, y, draws=1, seed=seed).curvature for seed in (0, 0, 1)]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    exact = [gate_statistics(model, groups, x, y, seed=seed).curvature for seed in (0, 1)]
    assert np.array_equal(*exact)


def test_many_classes_are_drawn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 17)).double().eval()
    groups = analyse(model, (4,), torch.float64).groups
    x, y = np.random.default_rng(0).normal(size=(8, 4)), np.arange(8)
    chosen, eight = gate_statistics(model, groups, x, y), gate_statistics(model, groups, x, y, draws=8)
    assert np.array_equal(chosen.curvature, eight.curvature)


def test_the_model_is_left_as_it_is_and_frozen_weights_do_not_matter():
    model, groups, x, y = prepared("residual stream")
    expected = gate_statistics(model, groups, x, y)
    frozen = copy.deepcopy(model).requires_grad_(False)
    found = gate_statistics(frozen, groups, x, y)
    np.testing.assert_allclose(found.curvature, expected.curvature, rtol=1e-12)
    np.testing.assert_allclose(found.gradient, expected.gradient, rtol=1e-9, atol=1e-15)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, frozen.state_dict()[name])


@pytest.mark.parametrize("draws", [None, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["residual stream", "attention heads"])
def test_a_sample_that_is_not_finite_is_named(name, draws, value):
    model, groups, x, y = prepared(name)
    x[4, 0, 0, 0] = value
    with pytest.raises(InputError, match="calibration sample 4 "):
        gate_statistics(model, groups, x, y, batch_size=3, draws=draws)


def test_samples_that_influence_one_another_are_refused():
    class Mixing(SequenceFirst):
        def forward(self, x):
            hidden = self.b(torch.tanh(self.a(x)))
            return self.head(hidden - hidden.mean(0)).mean(1)

    model = Mixing().double()
    groups = analyse(model, (6, 4), torch.float64).groups
    with pytest.raises(InputError, match="influence one another"):
        gate_statistics(model, groups, np.random.default_rng(0).normal(size=(3, 6, 4)), np.zeros(3, np.int64))


def test_a_network_without_channels_to_prune_has_no_gates():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    groups = analyse(model, (4,), torch.float64).groups
    found = gate_statistics(model, groups, np.zeros((2, 4)), np.zeros(2, np.int64))
    assert found.curvature.shape == (0,)
    assert np.isfinite(found.loss)
