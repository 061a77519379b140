"""Gates folded into weights against gates on what is read; the Gauss-Newton step against a dense solve."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cahfp_cli.coupling.analysis import analyse, cut
from cahfp_cli.coupling.groups import KEPT
from cahfp_cli.formats.gathering import scatter
from cahfp_cli.models.tensors import state_arrays
from cahfp_cli.pruning.compensation import (
    GREATEST_GATE,
    LARGEST_CHANGE,
    LEAST_GATE,
    STEPS,
    FoldedWeights,
    compensated,
    conjugate_gradients,
    factors_of_tensors,
    foldable,
    gauss_newton,
)
from cahfp_cli.pruning.submodel import gather_all, make_index_map
from cahfp_cli.significance.divergence import divergence
from cahfp_cli.significance.gates import ConsumerInputs, predict
from tests.pruning.test_linearised import Softmax, made_up
from tests.significance.test_gates import NETWORKS, explicit, logits_of_gates
from tests.significance.test_gates import gauss_newton as explicit_gauss_newton
from tests.significance.test_gates import prepared as prepared_groups
from tests.support.networks import Glu, Masks, Twice, examples, masks, networks

DIGEST = "0123456789abcdef" * 4


class Gated(ConsumerInputs):
    """Multiplies what every consumer reads by its groups' gates."""

    def __init__(self, groups, gates):
        super().__init__(groups)
        self.gates = np.append(gates, 1.0)

    def watch(self, consumer, x, axis):
        gates = torch.from_numpy(self.gates[consumer.groups]).to(x)
        return x * (gates if axis == -1 else gates.reshape(-1, *[1] * (x.dim() - 2)))


def gated(model, groups, x, gates):
    with torch.no_grad(), Gated(groups, gates):
        output = model(x)
    return output[0] if isinstance(output, tuple) else output


def prepared(name, dtype=torch.float64):
    model, _, x, _ = prepared_groups(name)
    model, x = model.to(dtype), torch.from_numpy(x).to(dtype)
    return model, analyse(model, tuple(x.shape[1:]), dtype), x


def some_gates(count, seed=0, movable=True):
    """Numbers that float32 holds, 1 where nothing is movable."""
    drawn = np.random.default_rng(seed).uniform(0.3, 3, count).astype(np.float32).astype(np.float64)
    return np.where(movable, drawn, 1.0)


def close(found, expected):
    scale = max(1.0, float(expected.abs().max()))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_gates_give_the_logits_of_gates_on_what_is_read(name):
    model, analysis, x = prepared(name)
    groups = analysis.groups
    plain, gates = copy.deepcopy(model), some_gates(groups.count)
    expected = gated(plain, groups, x, gates)
    assert (expected - predict(plain, x, 64)).abs().max() > 0.01
    weights = FoldedWeights(model, groups)
    for step in (some_gates(groups.count, 1), gates):  # from the original weights each time
        weights.set(step)
    close(predict(model, x, 64), expected)
    ways = [logits_of_gates(plain, groups, sample)(torch.from_numpy(gates)).detach() for sample in x]
    close(torch.stack(ways), expected)
    weights.set(np.ones(groups.count))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[key])


@given(network=networks(dtype=torch.float64), mask=masks, seed=st.integers(0, 2**16))
@examples(30)
def test_in_any_cut_network_gates_can_be_folded_but_those_that_a_tied_weight_reads(network, mask, seed):
    analysis = network.analyse()
    kept, fits = mask.of(analysis.groups), foldable(network.model, analysis)
    assert np.array_equal(fits, ~read_by_a_tied_weight(network.model, analysis.groups))
    gates = some_gates(analysis.groups.count, seed, fits)[kept]
    compact, groups = cut(network.model, analysis, kept)[0], analysis.groups.restricted(kept)
    x = network.samples(3)
    expected = gated(compact, groups, x, gates)
    FoldedWeights(compact, groups).set(gates)
    close(predict(compact, x, 64), expected)


# --- what can be folded ----------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    """A linear layer whose weight is scaled before use: a factor would be right, but nobody has proved that."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 2, self.bias)


class Normalised(nn.Linear):
    """A linear layer whose rows have the same length, however the weight is scaled."""

    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=1), self.bias)


class Squashed(nn.Linear):
    """A linear layer whose weight is squashed before use: a factor on the weight would not be one on what it reads."""

    def forward(self, x):
        return nn.functional.linear(x, torch.tanh(self.weight), self.bias)


class Product(nn.Linear):
    """A matrix product with a transposed weight."""

    def forward(self, x):
        return x @ self.weight.t() + self.bias


class LanguageModel(nn.Module):
    """A head that is the embedding too, or one of its own."""

    def __init__(self, tied):
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(9, 5), nn.Linear(5, 4), nn.Linear(4, 5)
        self.head = nn.Linear(5, 9, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens).mean(1)
        return self.head(x + self.down(torch.relu(self.up(x))))


def mlp(layer):
    """Families of 5, 6 and 4; `layer` reads the 6."""
    return nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), layer(6, 4), nn.Tanh(), nn.Linear(4, 2)
    )


def foldable_by_width(model, input_shape, dtype=torch.float32):
    """By the width of a family: whether its groups can be folded, all of them or none."""
    analysis = analyse(model.eval(), input_shape, dtype)
    fits, groups = foldable(model, analysis), analysis.groups
    found = [fits[groups.family == number] for number in range(len(groups.names))]
    assert all(family.all() == family.any() for family in found)
    return {len(family): bool(family.all()) for family in found}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [(nn.Linear, {6: True}), (Product, {6: True}), (Scaled, {6: False}), (Squashed, {6: False}), (Normalised, {})],
)
def test_a_weight_takes_gates_if_it_is_read_as_it_is(layer, expected):
    assert foldable_by_width(mlp(layer), (3,)) == {5: True, 4: True, **expected}  # {}: cannot even be pruned


def test_tied_weights_take_no_gates():
    model = mlp(nn.Linear)
    tied = nn.Sequential(*model[:-1], nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), model[-1])
    assert foldable_by_width(tied, (3,)) == {5: True, 6: True, 4: True}
    tied[8].weight = tied[6].weight
    assert foldable_by_width(tied, (3,)) == {5: True, 6: True, 4: False}


def test_one_layer_used_twice_takes_gates_and_one_that_is_shown_to_other_code_does_not():
    class Regularised(nn.Module):
        """Twice the same layer, and its norm in the output."""

        def __init__(self):
            super().__init__()
            self.start, self.twice, self.end = nn.Linear(3, 5), Twice(nn.Linear(5, 5)), nn.Linear(5, 2)

        def forward(self, x):
            return self.end(self.twice(self.start(x))) + self.twice.layer.weight.norm()

    twice = nn.Sequential(nn.Linear(3, 5), Twice(nn.Linear(5, 5)), nn.Linear(5, 2))
    assert foldable_by_width(twice, (3,)) == {5: True}
    assert foldable_by_width(Regularised(), (3,)) in ({5: False}, {})


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_is_the_head_too_takes_no_gates(tied):
    assert foldable_by_width(LanguageModel(tied), (7,), torch.int64) == {5: not tied, 4: True}


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "tied and transposed weights"])
def test_everything_else_takes_gates(name):
    model, analysis, _ = prepared(name)
    assert foldable(model, analysis).all()


def read_by_a_tied_weight(model, groups):
    """Boolean (groups,)."""
    state, found = model.state_dict(keep_vars=True), np.zeros(groups.count + 1, bool)
    for consumer in groups.consumers:
        if sum(tensor is state[consumer.tensor] for tensor in state.values()) > 1:
            found[consumer.groups] = True
    return found[:-1]


# --- factors and the index map ---------------------------------------------------------------------------------------


def check_against_index_map(model, analysis, kept, seed):
    """Checkpoint times the map's factors = the folded weights of the compact network, bit for bit, and back."""
    groups, arrays = analysis.groups, state_arrays(model)
    gates = some_gates(groups.count, seed, foldable(model, analysis))
    compact, rewrites = cut(model, analysis, kept)
    index_map = make_index_map(arrays, groups, kept, DIGEST, rewrites, gates)
    FoldedWeights(compact, groups.restricted(kept)).set(gates[kept])
    folded, gathered = state_arrays(compact), gather_all(arrays, index_map)
    for name, entry in index_map.tensors.items():
        assert gathered[name].tobytes() == folded[name].tobytes(), name
        restored = arrays[name].copy()
        scatter(gathered[name], entry, restored)
        assert restored.tobytes() == arrays[name].tobytes()
    plain = make_index_map(arrays, groups, kept, DIGEST, rewrites)
    assert not any(entry.factors for entry in plain.tensors.values())
    ones = make_index_map(arrays, groups, kept, DIGEST, rewrites, np.ones(groups.count))
    assert not any(entry.factors for entry in ones.tensors.values())
    return {name for name, entry in index_map.tensors.items() if entry.factors}


@pytest.mark.parametrize("name", NETWORKS)
def test_gathering_with_factors_gives_the_folded_weights_bit_for_bit(name):
    model, analysis, _ = prepared(name, torch.float32)
    for seed, kind in enumerate(["all", "random", "one each"]):
        scaled = check_against_index_map(model, analysis, Masks(kind, seed).of(analysis.groups), seed)
        assert bool(scaled) == (name != "tied and transposed weights")  # all of whose groups a tied weight reads


@given(network=networks(), mask=masks, seed=st.integers(0, 2**16))
@examples(20)
def test_gathering_with_factors_gives_the_folded_weights_of_any_network(network, mask, seed):
    analysis = network.analyse()
    check_against_index_map(network.model, analysis, mask.of(analysis.groups), seed)


def test_factors_are_those_of_surviving_slices_along_the_contracted_axis_only():
    model, groups = Softmax().model, Softmax().groups
    order = groups.labels["0.weight"][0]
    gates, kept = np.ones(7), np.ones(7, bool)
    gates[[1, 3, 5]], kept[[0, 3]] = (0.5, 2.0, 3.0), False
    found = factors_of_tensors(groups, kept, gates)
    assert found.keys() == {"2.weight"}
    rows, columns = found["2.weight"]
    assert rows is None and columns.dtype == np.float32
    assert columns.tolist() == [gates[group] for group in order if kept[group]]
    gates[[1, 5]] = 1
    assert factors_of_tensors(groups, kept, gates) == {}  # a removed group's gate is nobody's
    assert model[2].weight.shape == (4, 7)


# --- the step --------------------------------------------------------------------------------------------------------


def dense(linearised, free, damping):
    """(G + damping mean(diag G) I) and -g of the free gates, by plain loops over samples."""
    q, groups = linearised.probabilities.double().numpy(), len(free)
    jacobian = linearised.jacobian.double().numpy().reshape(groups, *q.shape)[free]
    matrix, right = np.zeros((free.sum(), free.sum())), np.zeros(free.sum())
    for sample, (own, reference) in enumerate(zip(q, linearised.reference.double().numpy(), strict=True)):
        j = jacobian[:, sample]
        matrix += j @ (np.diag(own) - np.outer(own, own)) @ j.T / len(q)
        right -= j @ (own - reference) / len(q)
    return matrix + damping * np.diag(matrix).mean() * np.eye(len(matrix)), right


@pytest.mark.parametrize("damping", [0.03, 0.2, 3.0])
@given(seed=st.integers(0, 2**16), groups=st.integers(1, 14))
@examples(40)
def test_the_step_is_the_dense_solution_for_the_free_gates_clipped(damping, seed, groups):
    rng = np.random.default_rng(seed)
    linearised = made_up(seed, groups=groups, samples=20, classes=4)
    for group in np.flatnonzero(rng.random(groups) < 0.3):
        linearised.remove(int(group))
    movable = rng.random(groups) < 0.7
    free = linearised.alive.numpy() & movable
    found = gauss_newton(linearised, movable, damping)
    assert found.dtype == np.float64 and found.shape == (groups,)
    assert (found[~free] == 0).all()
    if free.any():
        expected = np.linalg.solve(*dense(linearised, free, damping))
        np.testing.assert_allclose(
            found[free], expected.clip(-LARGEST_CHANGE, LARGEST_CHANGE), rtol=0, atol=1e-4 * np.abs(expected).max()
        )


def test_the_step_is_clipped_at_half():
    linearised = made_up(1, scale=0.02)  # gates that move little must move far
    found = gauss_newton(linearised, np.ones(6, bool), 1e-3)
    expected = np.linalg.solve(*dense(linearised, np.ones(6, bool), 1e-3))
    assert (np.abs(expected) > 1).any()
    far = np.abs(expected) > 0.6
    assert (found[far] == np.sign(expected[far]) * LARGEST_CHANGE).all()
    assert np.abs(found).max() == LARGEST_CHANGE == 0.5


def test_nothing_moves_where_nothing_may_or_the_reference_is_reached():
    assert (gauss_newton(made_up(0), np.zeros(6, bool)) == 0).all()
    net = Softmax()
    step = gauss_newton(net.linearised(), np.ones(7, bool))
    np.testing.assert_allclose(step, 0, atol=1e-9)


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30, 1.0, 1e30])
def test_a_right_hand_side_of_any_size_has_a_solution(size):
    """A network that hardly moves has gradients whose squares are zero in single precision."""
    matrix = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 1.0]])
    right = size * torch.tensor([1.0, -2.0, 3.0])
    found = conjugate_gradients(lambda vector: matrix @ vector, right, 10)
    expected = np.linalg.solve(matrix.double().numpy(), right.double().numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=2e-45)


@pytest.mark.parametrize("name", ["residual stream", "attention heads behind norms"])
def test_a_step_after_a_removal_brings_a_real_network_back_towards_the_reference(name):
    model, analysis, x = prepared(name)
    groups = analysis.groups
    kept = Masks("random", 3).of(groups)
    compact, left = cut(model, analysis, kept)[0], groups.restricted(kept)
    reference = predict(model, x, 64).softmax(1)
    logits, jacobian = explicit(compact, left, x.numpy())
    found = made_up(0, groups=left.count, samples=len(x))
    found.reference, found.jacobian = reference, jacobian.reshape(-1, left.count).T.contiguous()
    found.recentre(logits)
    step = gauss_newton(found, np.ones(left.count, bool))
    ggn = explicit_gauss_newton(logits, jacobian).mean(0)
    gradient = np.einsum("bk,bkg->g", logits.softmax(1) - reference, jacobian) / len(x)
    assert gradient @ step < 0 and gradient @ step + step @ ggn @ step / 2 < 0
    weights, before = FoldedWeights(compact, left), divergence(reference, logits)
    weights.set(1 + step / 4)
    assert divergence(reference, predict(compact, x, 64)) < before


# --- the line search -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "expected", "tried"), [({1.0, 0.5, 0.25}, 1.0, 1), ({0.5, 0.25}, 0.5, 2), ({0.25}, 0.25, 3), (set(), 0, 3)]
)
def test_the_largest_share_that_lowers_the_divergence_is_taken_and_none_if_none_does(good, expected, tried):
    gates, change, calls = np.array([1.0, 2.0, 0.5]), np.array([0.4, -0.2, 0.0]), []
    shares = {tuple(gates * (1 + share * change)): share for share in (1.0, 0.5, 0.25)}

    def logits_at(trial):
        calls.append(trial)
        return torch.tensor([[0.0, 0.0, 1.0 if shares.get(tuple(trial)) in good else 2.0]])  # 2 is no better than now

    reference = torch.full((1, 3), 1 / 3)
    found, logits = compensated(gates, change, reference, logits_at)
    np.testing.assert_allclose(found, gates * (1 + expected * change), rtol=1e-15)
    assert logits[0, 2] == (1.0 if good else 2.0)
    assert len(calls) == 1 + tried  # the first says where we are
    assert list(STEPS) == [1.0, 0.5, 0.25]
    assert gates.tolist() == [1.0, 2.0, 0.5]


def test_a_divergence_that_is_not_a_number_is_not_lower():
    gates, reference = np.ones(2), torch.full((1, 2), 0.5)

    def logits_at(trial):
        return torch.tensor([[0.0, 1.0 if trial is gates else np.nan]])

    found, logits = compensated(gates, np.full(2, 0.1), reference, logits_at)
    assert found is gates and logits[0, 1] == 1.0


@given(
    gates=st.lists(st.floats(LEAST_GATE, GREATEST_GATE), min_size=3, max_size=3),
    change=st.lists(st.floats(-LARGEST_CHANGE, LARGEST_CHANGE), min_size=3, max_size=3),
)
@examples(60)
def test_gates_stay_within_their_bounds_however_often_they_move(gates, change):
    found, better = np.array(gates), iter(range(100, 0, -1))
    for _ in range(6):
        reference = torch.full((1, 2), 0.5)
        found, _ = compensated(found, np.array(change), reference, lambda trial: torch.tensor([[0.0, next(better)]]))
        assert np.array_equal(found, found.clip(LEAST_GATE, GREATEST_GATE))
    assert [LEAST_GATE, GREATEST_GATE] == [0.25, 4.0]


def test_gates_of_a_halved_activation_reach_the_weights_that_read_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Glu(nn.Linear(4, 10), -1, True), nn.Linear(5, 2)).double().eval()
    analysis, x = analyse(model, (3,), torch.float64), torch.randn(5, 3, dtype=torch.float64)
    gates = some_gates(analysis.groups.count)
    expected = gated(copy.deepcopy(model), analysis.groups, x, gates)
    FoldedWeights(model, analysis.groups).set(gates)
    close(predict(model, x, 64), expected)
    assert all((consumer.groups != KEPT).any() for consumer in analysis.groups.consumers[1:])
