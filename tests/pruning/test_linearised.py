"""Predicted changes of the divergence against cut networks, autograd's Hessians, and one another, in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cahfp_cli.coupling.analysis import analyse, cut
from cahfp_cli.pruning.linearised import Linearised, Quadratic
from cahfp_cli.significance.divergence import divergence
from cahfp_cli.significance.gates import GateJacobian, gate_jacobian, predict
from cahfp_cli.significance.statistics import gate_statistics
from tests.significance.test_gates import NETWORKS, explicit, gauss_newton, logits_of_gates, prepared
from tests.support.networks import examples

SAMPLES, HIDDEN, CLASSES = 20, 7, 4
REFERENCES = ("network", "labels", "others")


class Softmax:
    """A model whose logits are linear in its gates, with samples and what to compare its predictions with."""

    def __init__(self, dtype=torch.float64, reference="network"):
        torch.manual_seed(2)
        self.model = nn.Sequential(nn.Linear(5, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).to(dtype).eval()
        nn.init.normal_(self.model[2].weight)  # removing a group matters
        self.analysis = analyse(self.model, (5,), dtype)
        self.groups = self.analysis.groups
        self.x = torch.randn(SAMPLES, 5, dtype=dtype)
        logits = predict(self.model, self.x, SAMPLES)
        self.reference = {
            "network": logits.softmax(1),
            "labels": nn.functional.one_hot(torch.arange(SAMPLES) % CLASSES, CLASSES).to(dtype),
            "others": torch.randn(SAMPLES, CLASSES, dtype=dtype).softmax(1),
        }[reference]

    def linearised(self):
        return linearised(self.model, self.groups, self.x, self.reference)

    def measured(self, removed):
        """Divergence of the network cut down."""
        kept = ~np.isin(np.arange(self.groups.count), removed)
        return divergence(self.reference, predict(cut(self.model, self.analysis, kept)[0], self.x, SAMPLES))

    def of_gates(self, z):
        """Divergence as a function of explicit gates, to be differentiated."""
        logits = torch.stack([logits_of_gates(self.model, self.groups, sample)(z) for sample in self.x])
        return (
            (torch.special.xlogy(self.reference, self.reference) - self.reference * logits.log_softmax(1)).sum(1).mean()
        )


def linearised(model, groups, x, reference=None):
    logits = predict(model, x, len(x))
    classes = torch.arange(logits.shape[1]).expand(len(x), -1)
    reference = logits.softmax(1) if reference is None else reference
    return Linearised(gate_jacobian(model, groups, x, classes, logits, relevance=reference), reference)


def made_up(seed, groups=6, samples=9, classes=3, scale=1.0):
    """Any Jacobian, and predictions that the reference differs from."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = GateJacobian(normal(samples, classes), scale * normal(samples, classes, groups))
    return Linearised(found, normal(samples, classes).softmax(1))


def everything(removal):
    """What a removal says: the divergence, and estimates and predictions for all groups."""
    groups = torch.arange(len(removal.alive))
    return torch.cat(
        [torch.tensor([removal.divergence()]), removal.estimate(), removal.together(list(groups[:, None]))]
    ).numpy()


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_where_logits_are_linear_in_the_gates_the_predicted_change_is_the_measured_one(dtype, tolerance, reference):
    net = Softmax(dtype, reference)
    removal, removed = net.linearised(), []
    for group in [4, 0, 6, 2, 3]:
        now = net.measured(removed)
        assert removal.divergence() == pytest.approx(now, abs=tolerance)
        candidates = torch.nonzero(removal.alive)[:, 0]
        expected = [net.measured([*removed, c]) - now for c in candidates.tolist()]
        np.testing.assert_allclose(
            removal.together(list(candidates[:, None])).numpy(), expected, rtol=0, atol=tolerance
        )
        removal.remove(group)
        removed.append(group)
        assert removal.alive.tolist() == [c not in removed for c in range(HIDDEN)]
    assert removal.divergence() == pytest.approx(net.measured(removed), abs=tolerance)
    assert removal.divergence() > 0.01  # nothing trivial


@pytest.mark.parametrize("reference", REFERENCES)
def test_the_quadratic_form_is_that_of_autograds_gradient_and_hessian(reference):
    net = Softmax(reference=reference)
    ones = torch.ones(HIDDEN, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(net.of_gates, ones)
    hessian = torch.autograd.functional.hessian(net.of_gates, ones)
    start = net.of_gates(ones).item()

    def expected(removed):
        d = torch.zeros(HIDDEN, dtype=torch.float64)
        d[removed] = 1
        return start + float(-gradient @ d + 0.5 * d @ hessian @ d)

    removal, removed = Quadratic.of(net.linearised()), []
    for group in [5, 1, 2, 0]:
        changes = [expected([*removed, c]) - expected(removed) for c in range(HIDDEN) if c not in removed]
        alive = torch.nonzero(removal.alive)[:, 0]
        np.testing.assert_allclose(removal.estimate()[alive].numpy(), changes, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(removal.together(list(alive[:, None])).numpy(), changes, rtol=1e-9, atol=1e-12)
        removal.remove(group)
        removed.append(group)
        assert removal.divergence() == pytest.approx(expected(removed), rel=1e-9)
    if reference == "network":
        np.testing.assert_allclose(gradient.numpy(), 0, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_interactions_between_groups_are_the_entries_of_the_explicit_gauss_newton_matrix(name):
    model, groups, x, _ = prepared(name)
    matrix = gauss_newton(*explicit(model, groups, x)).mean(0)
    start = linearised(model, groups, torch.from_numpy(x))
    found = np.zeros_like(matrix)
    for group in range(groups.count):
        removal = Quadratic.of(start)
        before = removal.estimate()
        removal.remove(group)
        found[group] = (removal.estimate() - before).numpy()
    scale = np.abs(matrix).max()
    np.testing.assert_allclose(found, matrix, atol=1e-9 * scale)
    np.testing.assert_allclose(start.curvature().numpy(), np.diag(matrix), atol=1e-9 * scale)
    np.testing.assert_allclose(start.estimate().numpy(), np.diag(matrix) / 2, atol=1e-9 * scale)


def test_interactions_of_a_scores_file_give_the_same_removal_as_the_network_itself():
    net = Softmax()
    statistics = gate_statistics(net.model, net.groups, net.x.numpy(), np.zeros(SAMPLES, np.int64))
    stored = Quadratic(torch.from_numpy(statistics.interactions), torch.zeros(HIDDEN))
    direct = Quadratic.of(net.linearised())
    for group in [3, 6, 1]:
        for removal in (stored, direct):
            removal.remove(group)
        np.testing.assert_allclose(everything(stored), everything(direct), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
@given(seed=st.integers(0, 2**16), toggled=st.lists(st.integers(0, 5), max_size=14))
@examples(40)
def test_what_was_removed_and_restored_leaves_no_trace(kind, seed, toggled):
    def fresh():
        start = made_up(seed)
        return start if kind == "linear" else Quadratic.of(start)

    removal = fresh()
    for group in toggled:
        (removal.remove if removal.alive[group] else removal.restore)(group)
    direct = fresh()
    left = [group for group in range(6) if toggled.count(group) % 2]
    for group in left:
        direct.remove(group)
    assert removal.alive.tolist() == direct.alive.tolist() == [group not in left for group in range(6)]
    np.testing.assert_allclose(everything(removal), everything(direct), rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 2**16))
@examples(30)
def test_a_prediction_is_the_difference_of_two_divergences(seed):
    for removal in (made_up(seed), Quadratic.of(made_up(seed))):
        removal.remove(2)
        for block in ([0], [5], [1, 3, 4]):
            now, change = removal.divergence(), float(removal.together([torch.tensor(block), torch.tensor([0])])[0])
            for group in block:
                removal.remove(group)
            assert removal.divergence() - now == pytest.approx(change, rel=1e-9, abs=1e-12)


def shrinking(difference):
    """`difference` for Jacobians scaled by 1/8, 1/16, 1/32: the ratio of each to the next."""
    found = [np.abs(difference(scale)).max() for scale in (1 / 8, 1 / 16, 1 / 32)]
    assert found[-1] > 0
    return [first / second for first, second in pairwise(found)]


@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_is_the_second_order_expansion_of_the_exact_change(seed):
    def difference(scale):
        start = made_up(seed, scale=scale)
        return (start.together(list(torch.arange(6)[:, None])) - start.estimate()).numpy()

    assert all(5 < ratio < 13 for ratio in shrinking(difference))  # third order: 8 each time


@pytest.mark.parametrize("seed", range(5))
def test_the_quadratic_form_agrees_with_the_softmax_of_linearised_logits_to_second_order(seed):
    def difference(scale):
        linear = made_up(seed, scale=scale)
        quadratic = Quadratic.of(linear)
        assert quadratic.divergence() == linear.divergence()
        np.testing.assert_allclose(quadratic.estimate(), linear.estimate(), rtol=1e-9, atol=1e-12)
        changes = []
        for group in (1, 4, 0):
            for removal in (linear, quadratic):
                removal.remove(group)
            changes.append(linear.divergence() - quadratic.divergence())
        return np.array(changes)

    assert all(5 < ratio < 13 for ratio in shrinking(difference))


def test_the_estimate_after_removals_has_the_gradient_there_and_the_curvature_of_the_start():
    removal = made_up(0)
    start, curvature = removal.logits, removal.curvature()
    for group in (0, 3):
        removal.remove(group)
    jacobian = removal.jacobian.T.reshape(9, 3, 6)
    logits = (start - jacobian[:, :, 0] - jacobian[:, :, 3]).requires_grad_()
    loss = -(removal.reference * logits.log_softmax(1)).sum(1).mean()
    (pull,) = torch.autograd.grad(loss, logits)
    gradient = torch.einsum("bk,bkg->g", pull, jacobian)
    np.testing.assert_allclose(removal.estimate().numpy(), (-gradient + curvature / 2).numpy(), rtol=1e-9)
    assert not np.allclose(curvature.numpy(), removal.curvature().numpy())


def test_measured_logits_take_the_place_of_predicted_ones():
    removal = made_up(0)
    removal.remove(1)
    measured = removal.logits + 0.3 * torch.randn(9, 3, dtype=torch.float64)
    removal.recentre(measured)
    assert removal.divergence() == pytest.approx(divergence(removal.reference, measured), rel=1e-12)
    expected = divergence(removal.reference, measured - removal.jacobian[2].reshape(9, 3))
    change = float(removal.together([torch.tensor([2])])[0])
    assert removal.divergence() + change == pytest.approx(expected, rel=1e-9)


def test_the_divergence_is_that_of_the_textbook():
    reference = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.25, 0.5], [0.8, 0.1, 0.1]], dtype=torch.float64)
    assert divergence(reference, q.log() + 3) == pytest.approx((np.log(2) - np.log(0.8)) / 2, rel=1e-12)
    assert divergence(q, q.log()) == pytest.approx(0, abs=1e-15)


def test_a_network_without_groups_can_be_linearised():
    removal = made_up(0, groups=0)
    for one in (removal, Quadratic.of(removal)):
        assert one.estimate().shape == (0,)
        assert one.divergence() == removal.divergence()
