"""Each criterion against an independent computation; what leads to it; the scores file."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from cahfp_cli.checkpoint.metadata import Provenance
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.coupling.analysis import analyse
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.models.tensors import state_arrays
from cahfp_cli.significance.criteria import obd
from cahfp_cli.significance.measure import Measuring, measure, subset
from cahfp_cli.significance.registry import CRITERIA, Evidence, find_criterion
from cahfp_cli.significance.scores import Scores, ScoresMetadata, read_scores, write_scores
from cahfp_cli.significance.statistics import GateStatistics, gate_statistics
from tests.significance.test_gates import Transposed
from tests.support.networks import Attention, Layer, VisionTransformer, randomise

PROVENANCE = Provenance(tool="cahfp 0", command="test")
DIGEST = "0123456789abcdef" * 4


def prepared(model, input_shape):
    """A model in float64 with norms as training leaves them, and its channel groups."""
    randomise(model)
    model = model.double().eval()
    return model, analyse(model, input_shape, torch.float64).groups


@pytest.fixture
def network():
    torch.manual_seed(7)  # every channel is alive on the calibration data
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    network = prepared(model, (2, 4, 4))
    with torch.no_grad():
        model[1].weight[2].neg_()
    return network


def calibration(shape=(2, 4, 4), samples=6, classes=3):
    rng = np.random.default_rng(1)
    return Dataset(rng.random((samples, *shape)), rng.integers(0, classes, samples), classes, "noise")


def gates(groups):
    """Made-up statistics."""
    names = ("gradient", "gradient_error", "gradient_magnitude", "gradient_square", "curvature")
    numbers = dict(zip(names, np.random.default_rng(5).normal(size=(5, groups)), strict=True))
    numbers |= {name: np.abs(numbers[name]) for name in names[1:]}
    rest = {"halves": np.ones((2, groups)), "contributions": np.ones(7), "interactions": None}
    return GateStatistics(**numbers, **rest, samples=7, loss=0.5)


def evidence(network, data=None, seed=0):
    model, groups = network
    return Evidence(model, groups, state_arrays(model), data or calibration(), gates(groups.count), seed)


def found_by(name, network, **changes):
    return find_criterion(name).function(evidence(network, **changes))


# --- weights that count --------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers that share a weight, and a buffer in the way of the channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.c.weight = self.b.weight
        self.register_buffer("scale", torch.rand(1, 4) + 5)

    def forward(self, x):
        x = torch.tanh(self.a(x)) * self.scale
        return self.head(torch.tanh(self.c(torch.tanh(self.b(x)))))


def test_tied_weights_count_once_and_buffers_not_at_all():
    torch.manual_seed(0)
    model, groups = prepared(Tied(), (3,))
    a, b, head = (model.state_dict()[f"{name}.weight"].numpy() for name in ("a", "b", "head"))
    order = groups.labels["a.weight"][0]
    assert (order >= 0).all() and "scale" in groups.labels
    of = [np.concatenate([a[i], b[i], b[:, i], head[:, i]]) for i in range(4)]  # tied: one index is one group in all
    expected = {"l1": [np.abs(one).sum() for one in of], "l2": [np.sqrt((one**2).sum()) for one in of]}
    for name, values in expected.items():
        np.testing.assert_allclose(found_by(name, (model, groups), data=calibration((3,)))[order], values, rtol=1e-12)
    squares = np.array(expected["l2"]) ** 2
    lamp = [square / squares[squares >= square].sum() for square in squares]
    np.testing.assert_allclose(found_by("lamp", (model, groups), data=calibration((3,)))[order], lamp, rtol=1e-12)
    sizes = groups.sizes(name for name, _ in model.named_parameters())
    assert (sizes[order] == 3 + 4 + 4 + 3 + 3).all()  # weights, and the biases of a, b and c


# --- one network: channel by channel ---------------------------------------------------------------------------------


def weights_of(network, channel):
    """All weights of one channel: its filter, and its 2 x 2 pixels in the linear layer."""
    conv, linear = (network[0].state_dict()[name].double() for name in ("0.weight", "4.weight"))
    return torch.cat([conv[channel].flatten(), linear[:, 4 * channel : 4 * channel + 4].flatten()])


def elements_of(tensors, channel):
    """Everything that goes with one channel, of tensors for the parameters of the network, by name."""
    own = [tensors[name][channel].flatten() for name in ("0.weight", "0.bias", "1.weight", "1.bias")]
    return torch.cat([*own, tensors["4.weight"][:, 4 * channel : 4 * channel + 4].flatten()])


def half_squares_times(second, network, channel):
    weights = elements_of(dict(network[0].named_parameters()), channel)
    return float((weights**2 * elements_of(second, channel)).sum().detach() / 2)


def lamp_of(network, channel):
    norms = [float(weights_of(network, other).square().sum()) for other in range(4)]
    return norms[channel] / sum(norm for norm in norms if norm >= norms[channel])


def gate_loss_of(network, channel):
    own = gates(4)
    gradient, error = own.gradient[channel], own.gradient_error[channel]
    inside = -error <= gradient <= error
    shrunk = 0 if inside else gradient - error if gradient > 0 else gradient + error
    return own.curvature[channel] / 2 - shrunk


EXPECTED = {
    "l1": lambda network, channel: float(weights_of(network, channel).abs().sum()),
    "l2": lambda network, channel: float(weights_of(network, channel).norm()),
    "lamp": lamp_of,
    "bn-scale": lambda network, channel: abs(network[0][1].weight[channel].item()),
    "gate-ggn": lambda network, channel: gates(4).curvature[channel] / 2,
    "gate-fisher": lambda network, channel: gates(4).gradient_square[channel] / 2,
    "gate-taylor": lambda network, channel: abs(gates(4).gradient[channel]),
    "gate-taylor-signed": lambda network, channel: -gates(4).gradient[channel],
    "gate-magnitude": lambda network, channel: gates(4).gradient_magnitude[channel],
    "gate-loss": gate_loss_of,
    "weight-fisher": lambda network, channel: half_squares_times(fisher(network, calibration()), network, channel),
    "obd": lambda network, channel: half_squares_times(probed(network, calibration(), 0), network, channel),
    "random": lambda network, channel: np.random.default_rng(0).random(4)[channel],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_criterion_equals_an_independent_computation(network, name):
    found = found_by(name, network)
    assert found.dtype == np.float64
    assert (found != 0).all()
    order = network[1].labels["0.weight"][0]
    assert order.tolist() == [0, 1, 2, 3]
    exact = 1e-9 if name in ("weight-fisher", "obd") else 1e-12
    np.testing.assert_allclose(found, [EXPECTED[name](network, channel) for channel in order], rtol=exact)


def test_every_criterion_has_a_test():
    find_criterion("l1")
    assert set(EXPECTED) == set(CRITERIA)


def test_an_unknown_criterion_is_answered_with_the_known_ones():
    with pytest.raises(UsageError, match=", ".join(sorted(EXPECTED))):
        find_criterion("magnitude")


def test_gate_loss_pulls_the_gradient_towards_zero_by_its_standard_error(network):
    numbers = {"gradient": [3, -3, 0.5, -0.5], "gradient_error": [1, 1, 1, 0.25], "curvature": [2, 2, 2, 0]}
    arrays = {name: np.array(values, np.float64) for name, values in numbers.items()}
    own = replace(evidence(network), gates=replace(gates(4), **arrays))
    assert find_criterion("gate-loss").function(own).tolist() == [1 - 2, 1 + 2, 1, 0.25]


# --- any network: second derivatives of the loss in the single weights -----------------------------------------------


def fisher(network, data):
    """Mean squared gradient of single samples in each parameter, by name."""
    model = network[0]
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(tensors, x, y):
        return nn.functional.cross_entropy(first(functional_call(model, tensors, (x[None],))), y[None])

    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    rows = [torch.func.grad(loss)(parameters, x[i], y[i]) for i in range(len(x))]
    return {name: torch.stack([row[name] for row in rows]).square().mean(0) for name in parameters}


def first(output):
    return output[0] if isinstance(output, tuple) else output


def in_groups(network):
    """The parameters of which some entry belongs to a group, by name."""
    model, groups = network
    return {n: p.detach() for n, p in model.named_parameters() if any((axis >= 0).any() for axis in groups.labels[n])}


def hessian(network, data):
    """Explicit Hessian of the mean loss in the parameters that belong to groups, one after the other."""
    chosen = in_groups(network)

    def loss(flat):
        tensors = dict(zip(chosen, unflattened(flat, chosen.values()), strict=True))
        logits = first(functional_call(network[0], tensors, (torch.from_numpy(data.x),)))
        return nn.functional.cross_entropy(logits, torch.from_numpy(data.y))

    flat = torch.cat([tensor.flatten() for tensor in chosen.values()])
    return torch.autograd.functional.hessian(loss, flat)


def unflattened(flat, shapes):
    parts = flat.split([tensor.numel() for tensor in shapes])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, shapes, strict=True)]


def by_name(network, flat):
    """A vector for the parameters in groups as tensors for all parameters, zero for the others."""
    chosen = in_groups(network)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in network[0].named_parameters()}
    return zeros | dict(zip(chosen, unflattened(flat, chosen.values()), strict=True))


def probed(network, data, seed):
    """v * (H v) of the explicit Hessian, mean over the criterion's own probes, by parameter name."""
    matrix = hessian(network, data)
    signs = [torch.cat([v.flatten() for v in v]) for v in obd.probes(list(in_groups(network).values()), seed)]
    assert len(signs) == 8
    return by_name(network, torch.stack([v * (matrix @ v) for v in signs]).mean(0))


def half_squares_by_group(network, second):
    """1/2 sum of w^2 h_w, walking through every index of every axis of every parameter."""
    model, groups = network
    total = np.zeros(groups.count)
    for name, parameter in model.named_parameters():
        elements = (parameter**2 * second[name] / 2).detach()
        for axis, labels in enumerate(groups.labels[name]):
            for i, group in enumerate(labels):
                if group >= 0:
                    total[group] += float(elements.select(axis, i).sum())
    return total


def transformer(fused):
    return VisionTransformer(4, [Layer(4, Attention(4, 2, 3, False, fused), 5, True)])


NETWORKS = {
    "weights of two groups": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.BatchNorm2d(3),
            nn.SiLU(),
            nn.Conv2d(3, 4, 1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        (2, 4, 4),
    ),
    "fused attention": (lambda: transformer(True), (2, 6, 6)),
    "tied and transposed weights, unused ones": (Transposed, (5,)),
}


@pytest.fixture(params=NETWORKS)
def any_network(request):
    torch.manual_seed(4)
    factory, shape = NETWORKS[request.param]
    return prepared(factory(), shape), calibration(shape)


def test_weight_fisher_equals_explicit_gradients_of_single_samples(any_network):
    network, data = any_network
    expected = half_squares_by_group(network, fisher(network, data))
    assert np.count_nonzero(expected) >= 5
    np.testing.assert_allclose(found_by("weight-fisher", network, data=data), expected, rtol=1e-9)


def test_obd_equals_an_explicit_hessian_under_the_same_probes(any_network):
    network, data = any_network
    unfused = (transformer(False).double().eval(), network[1]) if isinstance(network[0], VisionTransformer) else network
    unfused[0].load_state_dict(network[0].state_dict())
    expected = half_squares_by_group(unfused, probed(unfused, data, 3))
    found = found_by("obd", network, data=data, seed=3)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9 * np.abs(expected).max())


def test_obd_is_exact_over_probes_that_are_orthogonal(network, monkeypatch):
    hadamard = np.ones((1, 1))
    while len(hadamard) < sum(tensor.numel() for tensor in in_groups(network).values()):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rows = torch.from_numpy(hadamard)[:, : sum(tensor.numel() for tensor in in_groups(network).values())]
    monkeypatch.setattr(obd, "PROBES", len(rows))
    monkeypatch.setattr(obd, "probes", lambda weights, seed: (unflattened(row, weights) for row in rows))
    diagonal = by_name(network, hessian(network, calibration()).diagonal())
    np.testing.assert_allclose(found_by("obd", network), half_squares_by_group(network, diagonal), rtol=1e-9)


def test_obd_converges_to_the_exact_diagonal_at_the_rate_of_a_mean(network, monkeypatch):
    exact = half_squares_by_group(network, by_name(network, hessian(network, calibration()).diagonal()))

    def error(probes):
        monkeypatch.setattr(obd, "PROBES", probes)
        runs = [found_by("obd", network, seed=seed) for seed in range(12)]
        return np.mean(runs, 0), np.std(runs, 0)

    (_, few), (mean, many) = error(4), error(64)
    assert (np.abs(mean - exact) < 5 * many / np.sqrt(12)).all()  # unbiased
    assert 2.5 < np.mean(few / many) < 6  # 16 times the probes: a quarter of the deviation


def test_probes_are_signs_that_follow_the_seed(network):
    shapes = list(in_groups(network).values())
    once, again, other = (list(obd.probes(shapes, seed)) for seed in (0, 0, 1))
    flat = [torch.cat([v.flatten() for v in probe]) for probe in once]
    assert all((v.abs() == 1).all() for v in flat)
    assert all([v.shape for v in probe] == [tensor.shape for tensor in shapes] for probe in once)
    assert len({tuple(v.tolist()) for v in flat}) == 8
    assert all(torch.equal(a, b) for v, w in zip(once, again, strict=True) for a, b in zip(v, w, strict=True))
    assert not torch.equal(once[0][0], other[0][0])


def test_obd_does_not_depend_on_how_samples_share_a_graph(network, monkeypatch):
    whole = found_by("obd", network)
    monkeypatch.setattr(obd, "BATCH", 4)
    np.testing.assert_allclose(found_by("obd", network), whole, rtol=1e-9)


@pytest.mark.parametrize("name", ["weight-fisher", "obd"])
def test_float32_networks_score_as_in_float64(network, name):
    model, groups = network
    data = calibration()
    single = Dataset(data.x.astype(np.float32), data.y, data.classes, data.name)
    found = found_by(name, (copy.deepcopy(model).float(), groups), data=single)
    expected = found_by(name, network)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["weight-fisher", "obd"])
def test_the_model_is_left_as_it_is_and_frozen_weights_do_not_matter(network, name):
    model, groups = network
    expected = found_by(name, network)
    frozen = copy.deepcopy(model)
    frozen[0].requires_grad_(False)
    frozen[4].bias.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in frozen.parameters()]
    with torch.no_grad():
        assert np.array_equal(found_by(name, (frozen, groups)), expected)
    bad = calibration()
    bad.x[4, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="calibration sample 4 "):
        found_by(name, (frozen, groups), data=bad)
    assert flags == [parameter.requires_grad for parameter in frozen.parameters()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in [*model.parameters(), *frozen.parameters()])
    assert not model.training and not frozen.training
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, frozen.state_dict()[key])


class AlwaysFused(nn.Module):
    """Attention between pixels by code that insists on the fused kernel, which has no second derivative."""

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)[:, None].contiguous()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            mixed = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return mixed[:, 0].transpose(1, 2).reshape(x.shape)


def test_obd_says_so_where_there_is_no_second_derivative(network):
    network[0][2] = AlwaysFused()
    assert (found_by("weight-fisher", network) > 0).all()
    with pytest.raises(InputError, match=r"differentiate this network twice: .*not implemented\n.*weight-fisher"):
        found_by("obd", network)


# --- norms and families ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(4),
        lambda: nn.InstanceNorm2d(4, affine=True),
        lambda: nn.GroupNorm(4, 4),
        lambda: nn.Sequential(nn.Flatten(2), Transpose(), nn.LayerNorm(4), Transpose()),
        lambda: nn.Sequential(nn.Flatten(2), Transpose(), nn.RMSNorm(4), Transpose()),
    ],
    ids=["batch", "instance", "group", "layer", "rms"],
)
def test_bn_scale_reads_every_kind_of_norm_and_adds_up_those_of_a_group(norm):
    torch.manual_seed(0)
    between = norm()
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), between, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    network = prepared(model, (2, 4, 4))
    scale = next(p for name, p in between.named_parameters() if name.endswith("weight"))
    with torch.no_grad():
        scale.copy_(torch.tensor([-1.0, 2, -3, 4]))
    order = network[1].labels["0.weight"][0]
    assert sorted(order) == [0, 1, 2, 3]
    expected = np.abs(model[1].weight.detach().numpy()) + np.arange(1, 5)
    np.testing.assert_allclose(found_by("bn-scale", network)[order], expected, rtol=1e-12)


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm2d(3, affine=False)])
def test_bn_scale_names_the_family_that_no_norm_scales(norm):
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), norm(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(12, 3)).double().eval()
    network = model, analyse(model, (2, 4, 4), torch.float64).groups
    with pytest.raises(InputError, match=r"no normalisation layer scales the channels of 3\.weight\. Choose another"):
        found_by("bn-scale", network)


def line(first):
    """A family of hidden units with one weight each."""
    model = nn.Sequential(nn.Linear(1, len(first), bias=False), nn.Linear(len(first), 2)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(first)[:, None])
        model[1].weight.zero_()
    groups = analyse(model, (1,), torch.float64).groups
    assert groups.labels["0.weight"][0].tolist() == list(range(len(first)))
    return model, groups


def test_lamp_takes_equal_norms_in_the_order_of_their_numbers_and_zeros_as_worth_nothing():
    assert found_by("lamp", line([1.0, 2, -2, 0])).tolist() == [1 / 9, 4 / 8, 1, 0]
    assert found_by("lamp", line([0.0, 0, 0])).tolist() == [0, 0, 0]
    many, left = found_by("lamp", line([2.0, -1] * 40)), np.arange(40, 0, -1)
    np.testing.assert_allclose(many[::2], 4 / (4 * left), rtol=1e-12)
    np.testing.assert_allclose(many[1::2], 1 / (left + 4 * 40), rtol=1e-12)


def test_lamp_compares_within_a_family_only():
    torch.manual_seed(0)
    network = prepared(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), (5,))
    groups = network[1]
    found, norms = found_by("lamp", network), found_by("l2", network)
    for number in range(2):
        members = np.flatnonzero(groups.family == number)
        larger = [np.sum(norms[members][norms[members] >= norms[c]] ** 2) for c in members]
        np.testing.assert_allclose(found[members], norms[members] ** 2 / larger, rtol=1e-12)
        assert found[members].max() == 1


# --- what leads to a score -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize(("top", "draws"), [(None, None), (None, 2), (2, None)])
def test_the_same_seed_gives_the_same_bits(network, name, top, draws):
    criterion = find_criterion(name)
    how = Measuring(4, top, draws, seed=3)
    runs = [measure(*network, criterion, calibration(), how) for _ in range(2)]
    assert np.array_equal(runs[0].significance, runs[1].significance)
    assert (runs[0].gates is None) == (criterion.needs != "gates")


def test_what_each_criterion_needs_is_what_it_gets(network):
    needs = {name: find_criterion(name).needs for name in EXPECTED}
    assert {name for name in needs if needs[name] == "weights"} == {"l1", "l2", "lamp", "bn-scale", "random"}
    assert {name for name in needs if needs[name] == "samples"} == {"weight-fisher", "obd"}
    for name in EXPECTED:
        without = (*network, find_criterion(name), None, Measuring())
        if needs[name] == "weights":
            assert measure(*without).gates is None
        else:
            with pytest.raises(ValueError, match=f"{name} needs calibration data"):
                measure(*without)


def test_top_classes_and_draws_reach_the_statistics(network):
    ways = [(None, None), (2, None), (None, 2)]
    found = [measure(*network, find_criterion("gate-ggn"), calibration(), Measuring(4, *how)) for how in ways]
    for (top, draws), one in zip(ways, found, strict=True):
        own = gate_statistics(*network, calibration().x, calibration().y, batch_size=4, top=top, draws=draws)
        assert np.array_equal(one.significance, own.curvature / 2)
    assert not np.array_equal(found[0].significance, found[1].significance)
    assert not np.array_equal(found[0].significance, found[2].significance)


def test_progress_ends_at_the_number_of_samples(network):
    seen = []
    measure(*network, find_criterion("gate-ggn"), calibration(), Measuring(4), lambda *step: seen.append(step))
    assert seen == [(4, 6), (6, 6)]


def test_a_score_that_is_not_finite_is_refused(network):
    with torch.no_grad():
        network[0][0].weight[1, 0, 0, 0] = torch.inf
    with pytest.raises(InputError, match="l1 gives NaN or Inf for 1 groups"):
        measure(*network, find_criterion("l1"), None, Measuring())


def test_a_subset_is_drawn_once_each_in_order_by_seed():
    data = Dataset(np.arange(20, dtype=np.float32)[:, None], np.arange(20), 20, "numbers")
    chosen = subset(data, 8, 1)
    assert len(chosen) == 8
    assert np.array_equal(chosen.x[:, 0], chosen.y)
    assert (np.diff(chosen.y) > 0).all()
    assert np.array_equal(chosen.y, subset(data, 8, 1).y)
    assert not np.array_equal(chosen.y, subset(data, 8, 2).y)
    assert subset(data, 20, 1) is data


# --- the scores file ------------------------------------------------------------------------------------------------


def scores(**changes):
    metadata = {"checkpoint": DIGEST, "criterion": "gate-ggn", "samples": 9, "loss": 0.1, "families": ("a", "b")}
    fields = {
        "metadata": ScoresMetadata(provenance=PROVENANCE, **metadata),
        "significance": np.array([0.5, math.pi, 0.0]),
        "family": np.array([0, 1, 1]),
        "sizes": np.array([3, 4, 4]),
        "gradient": np.array([-1.0, 0.0, 1e-300]),
        "curvature": np.array([1.0, 2.0, 3.0]),
    }
    return Scores(**(fields | changes))


ARRAYS = ("significance", "family", "sizes", "gradient", "curvature")


@pytest.mark.parametrize("gates", [True, False])
def test_scores_survive_the_file_and_equal_ones_give_equal_bytes(tmp_path, gates):
    written = scores() if gates else scores(gradient=None, curvature=None)
    write_scores(tmp_path / "a", written)
    write_scores(tmp_path / "b", written)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = read_scores(tmp_path / "a")
    assert read.metadata == written.metadata
    for name in ARRAYS:
        expected, found = getattr(written, name), getattr(read, name)
        assert (found is None) == (expected is None)
        assert found is None or (found.dtype == expected.dtype and np.array_equal(found, expected))


FAULTS = {
    "NaN": {"significance": np.array([0.5, np.nan, 0.0])},
    "infinite curvature": {"curvature": np.array([1.0, np.inf, 0.0])},
    "too short": {"sizes": np.array([3, 4])},
    "two axes": {"significance": np.zeros((3, 1))},
    "another type": {"significance": np.zeros(3, np.float32)},
    "family out of range": {"family": np.array([0, 1, 2])},
    "negative family": {"family": np.array([0, -1, 1])},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_scores_are_refused_by_name_of_the_file(tmp_path, fault):
    write_scores(tmp_path / "scores", scores(**FAULTS[fault]))
    with pytest.raises(InputError, match="cahfp score") as error:
        read_scores(tmp_path / "scores")
    assert str(error.value).startswith(f"{tmp_path / 'scores'}: ")


@pytest.mark.parametrize("change", ["missing", "extra", "no metadata", "other metadata"])
def test_files_that_are_no_scores_are_refused(tmp_path, change):
    write_scores(tmp_path / "good", scores())
    with open_safetensors(tmp_path / "good") as file:
        arrays = {name: file.read(name) for name in file.tensors}
        metadata = dict(file.metadata)
    if change == "missing":
        del arrays["family"]
    if change == "extra":
        arrays["more"] = np.zeros(3)
    if change == "no metadata":
        metadata = {}
    if change == "other metadata":
        metadata["cahfp"] = json.dumps(json.loads(metadata["cahfp"]) | {"format": "cahfp.index_map/1"})
    save_arrays(tmp_path / "bad", arrays, metadata)
    with pytest.raises(InputError, match="bad"):
        read_scores(tmp_path / "bad")


def test_a_scores_file_cut_short_anywhere_or_with_a_flipped_header_is_refused(tmp_path):
    write_scores(tmp_path / "good", scores())
    whole = (tmp_path / "good").read_bytes()
    for length in [0, 7, 8, 40, len(whole) // 2, len(whole) - 1]:
        (tmp_path / "bad").write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_scores(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(whole[:9] + b"\x00" + whole[10:])
    with pytest.raises(InputError):
        read_scores(tmp_path / "bad")
