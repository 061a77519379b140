"""The gate Jacobian over a calibration set against explicit gates, and the groups of a network that was cut."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

from cahfp_cli.coupling.analysis import analyse, cut
from cahfp_cli.coupling.copying import tensors_of
from cahfp_cli.coupling.groups import KEPT
from cahfp_cli.errors import InputError
from cahfp_cli.significance import gates
from cahfp_cli.significance.gates import classes_looked_at, gate_jacobian, predict
from tests.end_to_end.test_rewritten_model import CODE
from tests.significance.test_gates import NETWORKS, close, explicit, gauss_newton, prepared
from tests.support.networks import Masks, examples, masked, masks, networks

SAMPLES, CLASSES = 12, 10
THRESHOLD = 0.02


def exact(model, groups, x, batch_size=64):
    """The Jacobian of all logits."""
    x = torch.as_tensor(x)
    logits = predict(model, x, batch_size)
    classes = torch.arange(logits.shape[1]).expand(len(x), -1)
    return gate_jacobian(model, groups, x, classes, logits, relevance=logits.softmax(1), batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_autograds_jacobian_of_explicit_gates(name, batch_size):
    model, groups, x, _ = prepared(name)
    before = copy.deepcopy(model.state_dict())
    logits, jacobian = explicit(model, groups, x)
    found = exact(model, groups, x, batch_size)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-12)
    close(found.jacobian.numpy(), jacobian.numpy(), 1e-9)
    assert found.jacobian.abs().max() > 0.01 and not found.jacobian.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def confident(classes=CLASSES):
    """A network of ten classes that is sure of some samples and unsure of others."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, classes)).double()
    nn.init.normal_(model[4].weight, std=9.0)
    x = torch.randn(SAMPLES, 5, dtype=torch.float64) * torch.linspace(0.1, 9, SAMPLES)[:, None]
    return model.eval(), analyse(model, (5,), torch.float64).groups, x[torch.randperm(SAMPLES)]


def with_threshold(model, groups, x, batch_size=4, relevance=None, threshold=THRESHOLD):
    logits = predict(model, x, 64)
    classes = torch.arange(logits.shape[1]).expand(len(x), -1)
    relevance = torch.zeros_like(logits) if relevance is None else relevance
    return gate_jacobian(
        model, groups, x, classes, logits, relevance=relevance, threshold=threshold, batch_size=batch_size
    )


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_with_a_threshold_the_gauss_newton_matrix_loses_no_more_than_the_neglected_mass(batch_size):
    model, groups, x = confident()
    whole, found = exact(model, groups, x), with_threshold(model, groups, x, batch_size)
    q = whole.logits.softmax(1)
    neglected = (found.jacobian - whole.jacobian).abs().amax(2) > 1e-9
    assert not neglected[q > THRESHOLD].any()
    assert batch_size == 64 or 0.1 < neglected.double().mean() < 0.9
    lost = gauss_newton(whole.logits, whole.jacobian) - gauss_newton(found.logits, found.jacobian)
    assert np.linalg.eigvalsh(lost).min() > -1e-12
    # Where a class moves as the mean m of the others, no more than q |J - m|^2 is lost with it.
    moved = (whole.jacobian - found.jacobian).square().sum(2)
    bound = (q * moved).sum(1).numpy()
    assert (np.trace(lost, axis1=1, axis2=2) <= bound + 1e-12).all()
    assert (bound <= (THRESHOLD * moved.sum(1)).numpy() + 1e-12).all()


def test_a_class_that_is_not_looked_at_moves_as_the_mean_of_the_others():
    model, groups, x = confident()
    whole, found = exact(model, groups, x).jacobian, with_threshold(model, groups, x, 1).jacobian
    q = predict(model, x, 64).softmax(1)
    assert (q > THRESHOLD).sum(1).min() == 1  # two are looked at all the same: one alone has no curvature
    for sample in range(SAMPLES):
        seen = q[sample].argsort(descending=True)[: max(2, int((q[sample] > THRESHOLD).sum()))]
        expected = (q[sample, seen, None] / q[sample, seen].sum() * whole[sample, seen]).sum(0).repeat(CLASSES, 1)
        expected[seen] = whole[sample, seen]
        np.testing.assert_allclose(found[sample], expected, rtol=1e-9, atol=1e-12)


def test_a_class_that_only_the_reference_cares_for_is_looked_at():
    model, groups, x = confident()
    whole, relevance = exact(model, groups, x), torch.zeros(SAMPLES, CLASSES, dtype=torch.float64)
    least = whole.logits.argmin(1)
    relevance[torch.arange(SAMPLES), least] = 1
    found = with_threshold(model, groups, x, relevance=relevance).jacobian
    np.testing.assert_allclose(found[range(SAMPLES), least], whole.jacobian[range(SAMPLES), least], rtol=1e-9)


def test_samples_that_need_few_classes_share_their_passes(monkeypatch):
    model, groups, x = confident()
    passes = []
    gradients = gates.GatedPass.gradients
    monkeypatch.setattr(gates.GatedPass, "gradients", lambda *given: (passes.append(1), gradients(*given))[1])
    with_threshold(model, groups, x, batch_size=4)
    q = predict(model, x, 64).softmax(1)
    needed = sorted(max(2, int(count)) for count in (q > THRESHOLD).sum(1))
    assert len(passes) == needed[3] + needed[7] + needed[11] < 3 * CLASSES


def test_neither_batches_nor_the_order_of_samples_matter():
    model, groups, x = confident()
    whole = exact(model, groups, x)
    order = torch.randperm(SAMPLES)
    for size in (1, 5, SAMPLES):
        found = exact(model, groups, x[order], size)
        np.testing.assert_allclose(found.logits, whole.logits[order], rtol=1e-12)
        np.testing.assert_allclose(found.jacobian, whole.jacobian[order], rtol=1e-9, atol=1e-13)
    matters = whole.logits.softmax(1) > THRESHOLD
    for size in (1, 5):
        found = with_threshold(model, groups, x[order], size).jacobian
        np.testing.assert_allclose(found[matters[order]], whole.jacobian[order][matters[order]], rtol=1e-9)
    again = with_threshold(model, groups, x, 5)
    assert torch.equal(again.jacobian, with_threshold(model, groups, x, 5).jacobian)


def test_of_more_than_16_classes_the_three_likeliest_are_looked_at():
    model, groups, x = confident(classes=17)
    logits, jacobian = explicit(model, groups, x.numpy())
    classes = classes_looked_at(logits, None)
    likeliest = [sorted(range(17), key=lambda k: -row[k])[:3] for row in logits.tolist()]
    assert classes.tolist() == likeliest
    assert classes_looked_at(logits, 2).tolist() == [row[:2] for row in likeliest]
    assert classes_looked_at(logits[:, :16], None).tolist() == [list(range(16))] * SAMPLES
    for top in (17, 40):
        assert classes_looked_at(logits, top).tolist() == [list(range(17))] * SAMPLES
    own = logits.gather(1, classes)
    found = gate_jacobian(model, groups, x, classes, own, relevance=own.softmax(1), batch_size=5)
    assert found.jacobian.shape == (SAMPLES, 3, groups.count) and found.logits is own
    chosen = torch.stack([rows[columns] for rows, columns in zip(jacobian, classes, strict=True)])
    close(found.jacobian.numpy(), chosen.numpy(), 1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(value):
    model, groups, x = confident()
    with torch.no_grad():
        model[4].bias[3] = value
    with pytest.raises(InputError, match="NaN or Inf on the calibration data"):
        exact(model, groups, x)


def test_derivatives_that_are_not_finite_are_refused():
    class Root(nn.Module):
        """A finite number with an infinite slope."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            return torch.sqrt(self.b(self.a(x)) * 0)

    model = Root().double().eval()
    with pytest.raises(InputError, match="derivative on the calibration data is NaN or Inf"):
        exact(model, analyse(model, (3,), torch.float64).groups, torch.randn(8, 3, dtype=torch.float64))


def test_predictions_are_the_models_own_whatever_the_batch_and_carry_no_graph():
    model, _, x = confident()
    for size in (1, 5, 64):
        found = predict(model, x, size)
        torch.testing.assert_close(found, model(x).detach(), rtol=1e-12, atol=1e-12)
        assert not found.requires_grad


# --- the groups of a network that was cut ----------------------------------------------------------------------------


@given(network=networks(dtype=torch.float64), mask=masks)
@examples(30)
def test_restricted_groups_are_those_of_the_cut_network(network, mask):
    analysis = network.analyse()
    groups = analysis.groups
    kept = mask.of(groups)
    compact = cut(network.model, analysis, kept)[0]
    left = groups.restricted(kept)
    assert left.count == kept.sum()
    np.testing.assert_array_equal(left.family, groups.family[kept])
    np.testing.assert_array_equal(left.widths(np.ones(left.count, bool)), groups.widths(kept))
    number_of = {group: number for number, group in enumerate(np.flatnonzero(kept))} | {KEPT: KEPT}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(compact).items()}
    for name, axes in {**left.labels, **left.unsaved}.items():
        assert tuple(map(len, axes)) == shapes[name]
        for found, before in zip(axes, {**groups.labels, **groups.unsaved}[name], strict=True):
            assert found.tolist() == [number_of[group] for group in before.tolist() if group in number_of]
    for found, before in zip(left.consumers, groups.consumers, strict=True):
        assert (found.call, found.tensor, found.axis) == (before.call, before.tensor, before.axis)
        assert found.groups.tolist() == [number_of[group] for group in before.groups.tolist() if group in number_of]


@given(network=networks(dtype=torch.float64), mask=masks)
@examples(30)
def test_gates_of_the_cut_network_move_its_logits_as_those_of_the_masked_full_one(network, mask):
    analysis = network.analyse()
    groups = analysis.groups
    kept = mask.of(groups, equivalent=True)
    compact = cut(network.model, analysis, kept)[0]
    x = network.samples(3)
    found = exact(compact, groups.restricted(kept), x)
    expected = exact(masked(network.model, groups, kept), groups, x)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    wanted = expected.jacobian[:, :, torch.from_numpy(kept)]
    np.testing.assert_allclose(found.jacobian, wanted, rtol=1e-7, atol=1e-9 * max(1.0, float(wanted.abs().max())))


def test_restricting_twice_is_restricting_once():
    _, groups, *_ = prepared("residual stream")
    rng = np.random.default_rng(0)
    first = rng.random(groups.count) < 0.7
    second = rng.random(first.sum()) < 0.7
    both = first.copy()
    both[first] = second
    once, twice = groups.restricted(both), groups.restricted(first).restricted(second)
    for name, axes in once.labels.items():
        assert [a.tolist() for a in axes] == [a.tolist() for a in twice.labels[name]]
    assert [c.groups.tolist() for c in once.consumers] == [c.groups.tolist() for c in twice.consumers]
    whole = groups.restricted(np.ones(groups.count, bool))
    assert all(
        np.array_equal(a, b) for n in groups.labels for a, b in zip(groups.labels[n], whole.labels[n], strict=True)
    )


def test_buffers_that_are_not_saved_are_restricted_too():
    scope = {}
    exec(CODE, scope)
    model = scope["Net"]().eval()
    analysis = analyse(model, (1, 8, 8))
    kept = Masks("random", 1).of(analysis.groups)
    compact, left = cut(model, analysis, kept)[0], analysis.groups.restricted(kept)
    assert left.unsaved.keys() == {"attention.bias"}
    (labels,) = left.unsaved["attention.bias"]
    assert len(labels) == len(compact.attention.bias) < len(model.attention.bias)
    assert labels.tolist() == left.labels["attention.qkv.weight"][0].tolist()
