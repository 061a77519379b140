"""Gate statistics against explicit gate parameters and autograd's own Jacobians and Hessians, in float64."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from cahfp_cli.coupling.analysis import analyse
from cahfp_cli.coupling.copying import tensors_of
from cahfp_cli.errors import InputError
from cahfp_cli.significance import statistics
from cahfp_cli.significance.statistics import gate_statistics
from tests.support.networks import Attention, Layer, Residual, VisionTransformer, masked, randomise

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


def explicit(model, groups, x):
    """Logits (n, classes) and their Jacobians in the gates (n, classes, groups), sample by sample."""
    ones = torch.ones(groups.count, dtype=torch.float64)
    functions = [logits_of_gates(model, groups, sample) for sample in torch.from_numpy(x)]
    logits = torch.stack([function(ones).detach() for function in functions])
    return logits, torch.stack([torch.autograd.functional.jacobian(function, ones) for function in functions])


def gauss_newton(logits, jacobian):
    """Gauss-Newton matrices of single samples, (n, groups, groups)."""
    rows = []
    for own, derivatives in zip(logits, jacobian, strict=True):
        p = own.softmax(0)
        rows.append(derivatives.T @ (torch.diag(p) - torch.outer(p, p)) @ derivatives)
    return torch.stack(rows).numpy()


def reference(model, groups, x, y):
    """Per-sample gate gradients (n, groups), Gauss-Newton matrices (n, groups, groups) and losses (n,)."""
    logits, jacobian = explicit(model, groups, x)
    rows = []
    for own, derivatives, label in zip(logits, jacobian, y, strict=True):
        p = own.softmax(0)
        gradient = derivatives.T @ (p - nn.functional.one_hot(torch.tensor(label), len(p)))
        rows.append((gradient, -p.log()[label]))
    gradient, losses = (torch.stack(column).numpy() for column in zip(*rows, strict=True))
    return gradient, gauss_newton(logits, jacobian), losses


def close(found, expected, tolerance=1e-6):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def products(found):
    """The Gauss-Newton matrix that the interactions stand for."""
    rows = found.interactions.astype(np.float64)
    return rows.T @ rows


@pytest.mark.parametrize("name", NETWORKS)
def test_gates_equal_explicit_gate_parameters(name):
    model, groups, x, y = prepared(name)
    gradient, ggn, losses = reference(model, groups, x, y)
    assert groups.count > 0
    found = gate_statistics(model, groups, x, y, batch_size=SAMPLES)
    close(found.gradient, gradient.mean(0))
    close(found.gradient_magnitude, np.abs(gradient).mean(0))
    close(found.gradient_square, (gradient**2).mean(0))
    close(found.gradient_error, gradient.std(0, ddof=1) / np.sqrt(SAMPLES))
    diagonals = np.stack([np.diag(matrix) for matrix in ggn])
    close(found.curvature, diagonals.mean(0))
    close(found.halves, [diagonals[::2].mean(0), diagonals[1::2].mean(0)])
    close(found.contributions, diagonals.sum(1))
    close(products(found), ggn.mean(0))
    assert found.interactions.dtype == np.float32
    assert found.samples == SAMPLES
    assert found.loss == pytest.approx(losses.mean(), rel=1e-6)
    drawn = gate_statistics(model, groups, x, y, batch_size=SAMPLES, draws=2)
    close(drawn.gradient, gradient.mean(0))
    close(drawn.gradient_square, (gradient**2).mean(0))
    close(drawn.gradient_error, gradient.std(0, ddof=1) / np.sqrt(SAMPLES))


@pytest.mark.parametrize("top", [1, 2, 3, 9])
@pytest.mark.parametrize("name", ["residual stream", "attention heads behind norms", "tied and transposed weights"])
def test_top_classes_are_those_of_a_softmax_over_the_likeliest_only(name, top):
    model, groups, x, y = prepared(name)
    gradient, _, losses = reference(model, groups, x, y)
    logits, jacobian = explicit(model, groups, x)
    ggn = []
    for own, derivatives in zip(logits, jacobian, strict=True):
        likeliest = sorted(range(len(own)), key=lambda k: -own[k])[:top]
        ggn.append(gauss_newton(own[None, likeliest], derivatives[None, likeliest])[0])
    found = gate_statistics(model, groups, x, y, top=top)
    close(found.gradient, gradient.mean(0))  # of the whole loss
    assert found.loss == pytest.approx(losses.mean(), rel=1e-6)
    if top == 1:
        assert (found.curvature == 0).all() and (found.interactions == 0).all()
    else:
        close(found.curvature, np.diag(np.mean(ggn, 0)))
        close(products(found), np.mean(ggn, 0))


@pytest.mark.parametrize("name", ["residual stream", "tied and transposed weights"])
def test_drawn_labels_give_the_products_of_their_gradients(name):
    model, groups, x, y = prepared(name)
    logits, jacobian = explicit(model, groups, x)
    p = logits.softmax(1)
    generator = torch.Generator().manual_seed(5)
    labels = torch.cat([torch.multinomial(p, 1, generator=generator) for _ in range(4)], 1)
    ggn = np.zeros((groups.count, groups.count))
    for sample in range(SAMPLES):
        for label in labels[sample]:
            gradient = (p[sample] - nn.functional.one_hot(label, p.shape[1])) @ jacobian[sample]
            ggn += np.outer(gradient, gradient) / (4 * SAMPLES)
    found = gate_statistics(model, groups, x, y, draws=4, seed=5)
    close(found.curvature, np.diag(ggn))
    close(products(found), ggn)


@pytest.mark.parametrize("name", ["residual stream", "tied and transposed weights"])
def test_results_do_not_depend_on_the_batch_size(name):
    model, groups, x, y = prepared(name)
    one, four = (gate_statistics(model, groups, x, y, batch_size=size) for size in (1, 4))
    fields = {field.name for field in dataclasses.fields(one)} - {"interactions"}
    for field in fields:
        np.testing.assert_allclose(getattr(one, field), getattr(four, field), rtol=1e-9, atol=1e-12)
    close(products(one), products(four))


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


@pytest.mark.parametrize("draws", [None, 2])
def test_interactions_are_reduced_to_as_many_rows_as_groups_and_keep_their_products(draws, monkeypatch):
    model, groups, x, y = linear_softmax()
    monkeypatch.setattr(statistics, "INTERACTION_BYTES", 4 * 4 * 5 * 5)  # not all at once: of four rows a group
    rows = []
    add = statistics.Totals.add
    monkeypatch.setattr(
        statistics.Totals, "add", lambda self, first, batch: (rows.append(batch.rows), add(self, first, batch))
    )
    found = gate_statistics(model, groups, x, y, batch_size=4, draws=draws)
    every = torch.cat([batch.flatten(0, 1) for batch in rows])
    assert every.shape == (40 * (draws or 3), groups.count)
    assert found.interactions.shape == (groups.count, groups.count) == (5, 5)
    close(products(found), (every.T @ every / 40).numpy())
    if draws is None:
        _, ggn, _ = reference(model, groups, x, y)
        close(products(found), ggn.mean(0))
    few = gate_statistics(model, groups, x[:1], y[:1], draws=draws)
    assert few.interactions.shape == (draws or 3, groups.count)


def test_interactions_that_are_too_large_or_not_asked_for_are_left_out(monkeypatch):
    model, groups, x, y = linear_softmax()
    kept, without = (gate_statistics(model, groups, x, y, batch_size=4, interactions=asked) for asked in (True, False))
    monkeypatch.setattr(statistics, "INTERACTION_BYTES", 4 * 3 * groups.count * 4)  # a batch of float32 fits exactly
    assert gate_statistics(model, groups, x[:4], y[:4], batch_size=4).interactions is not None
    large = gate_statistics(model, groups, x, y, batch_size=4)
    assert kept.interactions is not None and without.interactions is None and large.interactions is None
    for found in (without, large):
        for field in dataclasses.fields(found):
            if field.name != "interactions":
                assert np.array_equal(getattr(found, field.name), getattr(kept, field.name))


@pytest.mark.parametrize("samples", [1, 2, 5, 40])
@pytest.mark.parametrize("how", [{}, {"top": 2}, {"draws": 2}])
def test_halves_and_contributions_add_up_to_the_curvature(samples, how):
    model, groups, x, y = linear_softmax()
    found = gate_statistics(model, groups, x[:samples], y[:samples], batch_size=3, **how)
    even, odd = (samples + 1) // 2, samples // 2
    np.testing.assert_allclose((even * found.halves[0] + odd * found.halves[1]) / samples, found.curvature, rtol=1e-12)
    assert found.contributions.shape == (samples,)
    assert found.contributions.sum() == pytest.approx(samples * found.curvature.sum(), rel=1e-12)
    alone = [gate_statistics(model, groups, x[i : i + 1], y[i : i + 1]).curvature for i in range(samples)]
    if not how:
        np.testing.assert_allclose(found.contributions, np.sum(alone, 1), rtol=1e-9)
        np.testing.assert_allclose(found.halves[0], np.mean(alone[::2], 0), rtol=1e-9)


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


@pytest.mark.parametrize(("classes", "top"), [(16, 16), (17, 3)])
def test_of_more_than_16_classes_the_three_likeliest_are_looked_at(classes, top):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, classes)).double().eval()
    groups = analyse(model, (4,), torch.float64).groups
    x, y = np.random.default_rng(0).normal(size=(8, 4)), np.arange(8)
    chosen, asked = gate_statistics(model, groups, x, y), gate_statistics(model, groups, x, y, top=top)
    assert np.array_equal(chosen.curvature, asked.curvature)
    logits, jacobian = explicit(model, groups, x)
    likeliest = logits.argsort(1, descending=True)[:, :top]
    restricted = torch.stack([own[rows] for own, rows in zip(jacobian, likeliest, strict=True)])
    close(products(chosen), gauss_newton(logits.gather(1, likeliest), restricted).mean(0))
    close(chosen.gradient, reference(model, groups, x, y)[0].mean(0))
    all_of_them = gate_statistics(model, groups, x, y, top=classes)
    close(all_of_them.curvature, np.diag(gauss_newton(logits, jacobian).mean(0)))
    assert np.array_equal(chosen.curvature, all_of_them.curvature) == (classes == 16)


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
    assert found.curvature.shape == found.gradient_error.shape == (0,)
    assert products(found).shape == (0, 0)
    assert np.isfinite(found.loss)
