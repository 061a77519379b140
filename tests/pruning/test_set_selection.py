"""Selection that sees the set, on a network trained on digits: budgets, accuracy, what is predicted and measured."""

import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cahfp_cli.checkpoint.metadata import ModelSpec
from cahfp_cli.coupling.analysis import analyse, cut
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.data.spec import load_data
from cahfp_cli.device.catalogue import load_profile
from cahfp_cli.device.cost import compile_workload
from cahfp_cli.device.quantities import Count, Share
from cahfp_cli.device.workload import make_workload
from cahfp_cli.errors import BudgetError, InputError
from cahfp_cli.models.spec import build
from cahfp_cli.models.tensors import state_arrays
from cahfp_cli.pruning import set_selection
from cahfp_cli.pruning.budget import Budget, Limits, values_of
from cahfp_cli.pruning.compensation import GREATEST_GATE, LEAST_GATE, compensated, foldable
from cahfp_cli.pruning.selection import select
from cahfp_cli.pruning.set_selection import SetOptions, compared, select_from_interactions, select_set, towards
from cahfp_cli.pruning.submodel import gather_all, make_index_map, with_arrays
from cahfp_cli.pruning.target import Target
from cahfp_cli.running.evaluation import evaluate
from cahfp_cli.significance.gates import gate_jacobian, predict
from cahfp_cli.significance.statistics import gate_statistics
from cahfp_cli.training.sgd import TrainOptions, train
from tests.end_to_end.test_rewritten_model import CODE
from tests.support.networks import Attention, Layer, VisionTransformer, randomise

CPU = torch.device("cpu")
NAMES = ("latency", "memory", "storage", "macs", "params")
QUICK = SetOptions(rounds=3, at_once=128)


class Case:
    """A network with its analysis, cost model and calibration samples."""

    def __init__(self, model, calibration, profile="raspberry-pi-4"):
        self.model, self.calibration = model.eval(), calibration
        self.analysis = analyse(model, calibration.input_shape)
        self.groups, self.profile = self.analysis.groups, load_profile(profile)
        self.cost = costs(model, self.analysis, self.profile)
        self.full = self.cost.cost(np.array(self.cost.workload.full_widths))

    def select(self, budget, options=QUICK):
        return select_set(self.model, self.analysis, self.cost, budget, self.calibration, options)

    def made(self, selection):
        """The submodel as `prune` makes it."""
        arrays = state_arrays(self.model)
        compact, rewrites = cut(self.model, self.analysis, selection.kept)
        gates = selection.gates
        index_map = make_index_map(arrays, self.groups, selection.kept, "0" * 64, rewrites, gates)
        return with_arrays(compact, gather_all(arrays, index_map))


def costs(model, analysis, profile):
    itemsizes = {name: tensor.element_size() for name, tensor in model.state_dict().items()}
    return compile_workload(make_workload(analysis, itemsizes), profile)


@pytest.fixture(scope="module")
def digits():
    """A small VGG after three epochs."""
    torch.set_num_threads(1)
    data = load_data("digits@train")
    model = build(ModelSpec(spec="vgg11", args={"width": 0.125}), data.input_shape, 10)
    train(model, data, TrainOptions(epochs=4, lr=0.05), CPU)
    model.zero_grad()
    return Case(model, data)


@pytest.fixture(scope="module")
def half(digits):
    return digits.select(Budget(macs=Share(0.5)))


def accuracy(model):
    return evaluate(model, load_data("digits@test"), 256, CPU).accuracy


def measured(case, samples, **how):
    """Gate statistics."""
    data = case.calibration
    return gate_statistics(case.model, case.groups, data.x[:samples], data.y[:samples], **how)


# --- accuracy --------------------------------------------------------------------------------------------------------


def test_without_training_it_is_far_above_scores_of_single_groups_at_the_same_macs(digits):
    before = accuracy(digits.model)
    assert before > 0.9
    found = measured(digits, 256, interactions=False)
    for share, loses in ((0.5, 0.05), (0.3, 0.15)):
        budget = Budget(macs=Share(share))
        alone = select(found.curvature / 2, digits.groups.family, digits.cost, budget, digits.groups.narrowest)
        together = digits.select(budget, SetOptions(rounds=5))
        assert alone.cost.macs == pytest.approx(together.cost.macs, rel=0.02)
        left = accuracy(digits.made(together))
        assert left > before - loses
        assert left > accuracy(digits.made(alone)) + 0.4


def test_interactions_alone_are_better_than_scores_of_single_groups_too(digits):
    found = measured(digits, 32)
    budget = Budget(macs=Share(0.5))
    alone = select(found.curvature / 2, digits.groups.family, digits.cost, budget, digits.groups.narrowest)
    seen = select_from_interactions(found.interactions, digits.groups, digits.cost, budget)
    assert accuracy(digits.made(seen)) > accuracy(digits.made(alone)) + 0.1
    assert seen.gates is None and seen.cost.macs <= 0.5 * digits.full.macs
    removed = found.interactions[:, ~seen.kept].sum(1, dtype=np.float64)
    assert seen.prediction.predicted == pytest.approx(removed @ removed / 2, rel=1e-3)
    assert seen.prediction.measured is None and seen.prediction.final is None


# --- budgets ---------------------------------------------------------------------------------------------------------


def check(case, selection, budget):
    """The limits hold for the compact network itself, analysed anew."""
    compact = case.made(selection)
    analysis = analyse(compact, case.calibration.input_shape)
    model = costs(compact, analysis, case.profile)
    real = model.cost(np.array(model.workload.full_widths))
    for name in NAMES:
        assert float(values_of(real, name)) == pytest.approx(float(values_of(selection.cost, name)), rel=1e-12)
    for name, limit in selection.limits.by_name.items():
        assert float(values_of(real, name)) <= limit
    assert int(real.params) == sum(tensor.numel() for tensor in compact.state_dict().values())
    with FlopCounterMode(display=False) as counter:
        compact(torch.from_numpy(case.calibration.x[:1]))
    assert counter.get_total_flops() == 2 * int(real.macs)
    widths = case.groups.widths(selection.kept)
    full = case.groups.widths(np.ones(case.groups.count, bool))
    assert (widths >= case.groups.narrowest).all()
    if budget.keep is not None:
        assert (widths <= np.maximum(np.floor(full * budget.keep + 0.5), 1)).all()
    assert np.isfinite(predict(compact, torch.from_numpy(case.calibration.x[:8]), 8)).all()


def between(case, name, share):
    """A limit between the narrowest network and the full one."""
    low = case.cost.cost(np.minimum(case.cost.workload.full_widths, case.groups.narrowest))
    value = (1 - share) * float(values_of(low, name)) + share * float(values_of(case.full, name))
    return value if name == "latency" else Count(int(value)) if name in ("macs", "params") else int(value)


@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("name", NAMES)
def test_budgets_of_every_kind_hold_for_the_compact_network_itself(digits, name, share):
    budget = Budget(**{name: between(digits, name, share)})
    selection = digits.select(budget, SetOptions(rounds=2, polish=0, at_once=64))
    check(digits, selection, budget)
    assert selection.binding == name
    limit = selection.limits.by_name[name]
    assert float(values_of(selection.cost, name)) > 0.9 * limit  # what is allowed is used


def test_every_family_keeps_the_share_that_keep_says(digits):
    selection = digits.select(Budget(keep=0.4), SetOptions(rounds=3, at_once=64))
    check(digits, selection, Budget(keep=0.4))
    full = digits.groups.widths(np.ones(digits.groups.count, bool))
    assert digits.groups.widths(selection.kept).tolist() == np.floor(full * 0.4 + 0.5).tolist()
    assert selection.binding == "keep"


def test_limits_hold_together_and_the_whole_network_is_kept_where_it_fits(digits):
    budget = Budget(**{name: between(digits, name, 0.5) for name in NAMES}, keep=0.9)
    check(digits, digits.select(budget, SetOptions(rounds=2, at_once=64)), budget)
    whole = digits.select(Budget(macs=Share(1.0)), SetOptions(rounds=2, at_once=64))
    assert whole.kept.all()
    assert whole.prediction.predicted == pytest.approx(0, abs=1e-6)
    assert whole.prediction.measured == pytest.approx(0, abs=1e-6)
    assert whole.prediction.final == pytest.approx(0, abs=1e-6)


def test_a_budget_that_cannot_be_met_names_the_smallest_value_which_can_be_passed_back(digits):
    with pytest.raises(BudgetError, match="cannot be met even with the fewest channels a layer") as error:
        digits.select(Budget(params=Count(3)))
    smallest = int(re.search(r"params 3 \(smallest reachable: (\d+)\)", str(error.value))[1])
    with pytest.raises(BudgetError, match="smallest reachable"):
        digits.select(Budget(params=Count(smallest - 1)))
    found = measured(digits, 16)
    with pytest.raises(BudgetError, match=f"smallest reachable: {smallest}"):
        select_from_interactions(found.interactions, digits.groups, digits.cost, Budget(params=Count(3)))
    budget = Budget(params=Count(smallest))
    for selection in (
        digits.select(budget, SetOptions(rounds=2, at_once=32)),
        select_from_interactions(found.interactions, digits.groups, digits.cost, budget),
    ):
        assert digits.groups.widths(selection.kept).tolist() == digits.groups.narrowest.tolist()


# --- what is predicted, measured and changed -------------------------------------------------------------------------


def test_the_final_divergence_is_that_of_the_submodel_from_the_full_network(digits, half):
    x = torch.from_numpy(digits.calibration.x)
    p = predict(digits.model, x, 256).double().log_softmax(1)
    q = predict(digits.made(half), x, 256).double().log_softmax(1)
    expected = (p.exp() * (p - q)).sum(1).mean().item()
    assert half.prediction.final == pytest.approx(expected, rel=1e-4)


def test_compensation_lowers_the_divergence_that_removal_leaves(digits, half):
    without = digits.select(Budget(macs=Share(0.5)), replace(QUICK, compensate=False))
    assert without.gates is None
    assert half.prediction.final < 0.5 * without.prediction.final
    assert half.prediction.final < half.prediction.measured
    polished = digits.select(Budget(macs=Share(0.5)), replace(QUICK, polish=3))
    unpolished = digits.select(Budget(macs=Share(0.5)), replace(QUICK, polish=0))
    assert np.array_equal(polished.kept, unpolished.kept)
    assert polished.prediction.final < unpolished.prediction.final


def test_gates_are_within_their_bounds_and_1_where_they_cannot_be_folded(digits, half):
    moved = half.gates[half.kept]
    assert (moved != 1).mean() > 0.9
    assert moved.min() >= LEAST_GATE and moved.max() <= GREATEST_GATE
    assert foldable(digits.model, digits.analysis).all()


def test_over_several_rounds_what_is_measured_is_near_what_was_predicted(digits):
    found = digits.select(Budget(macs=Share(0.5)), SetOptions(rounds=8, at_once=128)).prediction
    assert 0.4 < found.measured / found.predicted < 2.5
    assert found.measured != found.predicted


@pytest.mark.parametrize("options", [QUICK, replace(QUICK, model="quadratic", reference="labels")])
def test_the_same_inputs_give_the_same_bits_and_the_model_stays_as_it_was(digits, options):
    before = {name: array.tobytes() for name, array in state_arrays(digits.model).items()}
    x, y = digits.calibration.x.copy(), digits.calibration.y.copy()
    runs = [digits.select(Budget(macs=Share(0.4)), options) for _ in range(2)]
    assert runs[0].kept.tobytes() == runs[1].kept.tobytes()
    assert runs[0].gates.tobytes() == runs[1].gates.tobytes()
    assert runs[0].prediction == runs[1].prediction
    assert {name: array.tobytes() for name, array in state_arrays(digits.model).items()} == before
    assert np.array_equal(x, digits.calibration.x) and np.array_equal(y, digits.calibration.y)
    assert not digits.model.training
    assert all(p.grad is None and p.requires_grad for p in digits.model.parameters())


def test_rounds_look_at_samples_of_their_own_and_judge_compensation_on_the_next_ones(monkeypatch):
    torch.manual_seed(0)
    data = noise((12,), 4, samples=50)
    data.x[:, 0] = np.arange(50) / 50  # tells them apart
    case, linearised, judged = Case(nn.Sequential(*mlp(12, 16, 16, 4)), data), [], []

    def numbers(samples):
        return (samples[:, 0] * 50).round().int().tolist()

    def jacobian(model, groups, samples, *given, **options):
        linearised.append(numbers(samples))
        return gate_jacobian(model, groups, samples, *given, **options)

    def seen(model, samples, batch_size):
        judged.append(numbers(samples))
        return predict(model, samples, batch_size)

    def search(gates, change, reference, logits_at):
        with monkeypatch.context() as patch:
            patch.setattr(set_selection, "predict", seen)
            return compensated(gates, change, reference, logits_at)

    monkeypatch.setattr(set_selection, "gate_jacobian", jacobian)
    monkeypatch.setattr(set_selection, "compensated", search)
    case.select(Budget(params=Share(0.6)), SetOptions(rounds=3, polish=1, at_once=20))
    stretches = [[(20 * number + i) % 50 for i in range(20)] for number in range(1, 6)]
    assert linearised == stretches[:4]
    assert [rows for i, rows in enumerate(judged) if not i or rows != judged[i - 1]] == stretches[1:]


def test_what_is_predicted_is_the_softmax_of_linearised_logits_or_the_quadratic_form(digits):
    data = Dataset(digits.calibration.x[:100], digits.calibration.y[:100], 10, "digits")
    case = Case(digits.model, data)
    x = torch.from_numpy(data.x)
    logits = predict(digits.model, x, 100)
    classes, q = torch.arange(10).expand(100, -1), logits.softmax(1)
    jacobian = gate_jacobian(digits.model, case.groups, x, classes, logits, relevance=q).jacobian
    for model in ("linear", "quadratic"):
        options = SetOptions(rounds=1, compensate=False, model=model, relevance=0.0, at_once=100)
        found = case.select(Budget(macs=Share(0.9)), options)
        moved = jacobian[:, :, torch.from_numpy(~found.kept)].sum(2).double()
        shifted = (logits - moved).log_softmax(1)
        if model == "linear":
            expected = (q * (logits.log_softmax(1) - shifted)).sum(1).mean().item()
        else:
            expected = ((q * moved.square()).sum(1) - (q * moved).sum(1).square()).mean().item() / 2
        assert found.prediction.predicted == pytest.approx(expected, rel=1e-3)
        assert found.prediction.measured == pytest.approx(found.prediction.final, rel=1e-5)


def test_limits_on_the_way_fall_by_equal_factors_and_end_where_they_must(digits):
    whole = float(digits.full.macs)
    limits = Limits({"macs": whole * 0.1, "params": float(digits.full.params) * 3})
    wide = digits.cost.full_widths
    target = Target(limits, np.ones_like(wide), wide // 2)
    for share in (0.0, 0.25, 0.5):
        found = towards(target, digits.cost, share)
        assert found.limits.by_name == {"macs": pytest.approx(whole * 0.1**share), "params": limits.by_name["params"]}
        assert (found.most >= wide - share * (wide - wide // 2)).all() and (found.most <= wide).all()
    assert towards(target, digits.cost, 1.0).limits == limits
    assert np.array_equal(towards(target, digits.cost, 1.0).most, target.most)


def test_progress_counts_rounds_and_polish(digits):
    for options, total in ((SetOptions(rounds=2, polish=1, at_once=32), 3), (replace(QUICK, compensate=False), 3)):
        seen = []
        select_set(
            digits.model,
            digits.analysis,
            digits.cost,
            Budget(macs=Share(0.6)),
            digits.calibration,
            options,
            lambda *step, seen=seen: seen.append(step),
        )
        assert seen == [(done, total) for done in range(1, total + 1)]


# --- references ------------------------------------------------------------------------------------------------------


def test_with_labels_as_reference_the_divergence_is_the_cross_entropy(digits):
    selection = digits.select(Budget(macs=Share(0.5)), replace(QUICK, reference="labels"))
    loss = evaluate(digits.made(selection), digits.calibration, 256, CPU).loss
    assert selection.prediction.final == pytest.approx(loss, rel=1e-4)
    assert accuracy(digits.made(selection)) > 0.85


def test_labels_do_not_matter_where_the_network_is_the_reference(digits, half):
    data = digits.calibration
    other = SimpleNamespace(**vars(digits))
    other.calibration = Dataset(data.x, (data.y + 1) % 10, 10, data.name)
    again = Case.select(other, Budget(macs=Share(0.5)))
    assert np.array_equal(again.kept, half.kept) and np.array_equal(again.gates, half.gates)


def test_of_many_classes_the_likeliest_are_compared_and_the_label_is_always_among_them():
    torch.manual_seed(0)
    logits = torch.randn(40, 20, dtype=torch.float64)
    likeliest = logits.argsort(1, descending=True)[:, :3]
    classes, reference = compared(logits, None)
    assert torch.equal(classes, likeliest)
    torch.testing.assert_close(reference, logits.gather(1, likeliest).softmax(1))
    labels = torch.arange(40) % 20
    classes, reference = compared(logits, labels)
    assert torch.equal(reference.sum(1), torch.ones(40, dtype=torch.float64))
    assert torch.equal(classes[reference == 1], labels)
    among = (likeliest == labels[:, None]).any(1)
    assert 0 < among.sum() < 40
    assert torch.equal(classes[among], likeliest[among])
    assert torch.equal(classes[~among, :2], likeliest[~among, :2])
    few, all_classes = compared(logits[:, :16], None), torch.arange(16).expand(40, -1)
    assert torch.equal(few[0], all_classes)
    torch.testing.assert_close(few[1], logits[:, :16].softmax(1))


# --- other networks --------------------------------------------------------------------------------------------------


def noise(shape, classes, samples=96):
    random = np.random.default_rng(0)
    x = random.normal(size=(samples, *shape)).astype(np.float32)
    return Dataset(x, random.integers(0, classes, samples), classes, "noise")


def rewritten():
    """A model whose code fixes its widths, so that a cut must rewrite it."""
    scope = {}
    exec(CODE, scope)
    return scope["Net"](), noise((1, 8, 8), 10)


def transformer():
    layers = [Layer(8, Attention(8, 4, 3, packed, False), 16, True) for packed in (True, False)]
    return VisionTransformer(8, layers), noise((2, 6, 6), 3)


def mlp(*widths):
    layers = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.Tanh())]
    return layers[:-1]


def many_classes():
    """More classes than are looked at."""
    return nn.Sequential(*mlp(12, 32, 24, 20)), noise((12,), 20)


def tied():
    """A weight that is used under two names, which takes no gates, before others that do."""
    layers = mlp(12, 20, 20, 20, 16, 4)
    layers[4].weight = layers[2].weight
    return nn.Sequential(*layers), noise((12,), 4)


@pytest.mark.parametrize("factory", [rewritten, transformer, many_classes, tied])
def test_networks_of_other_kinds_are_selected_by_the_same_path(factory):
    torch.manual_seed(4)
    model, data = factory()
    randomise(model)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 2  # else nothing that is removed matters
    case = Case(model, data, "jetson-orin-nano")
    assert bool(case.analysis.rewritten) == (factory is rewritten)
    budget = Budget(params=Share(0.6))
    for options in (QUICK, replace(QUICK, model="quadratic", reference="labels")):
        selection = case.select(budget, options)
        check(case, selection, budget)
        fits = foldable(model, case.analysis)
        assert (selection.gates[~fits] == 1).all() and (selection.gates[fits & selection.kept] != 1).any()
        assert fits.all() == (factory is not tied)
        without = case.select(budget, replace(options, compensate=False))
        assert selection.prediction.final < without.prediction.final
        x, full = torch.from_numpy(data.x), predict(model, torch.from_numpy(data.x), 64)
        labels = torch.from_numpy(data.y) if options.reference == "labels" else None
        classes, reference = compared(full, labels)
        q = predict(case.made(selection), x, 64).gather(1, classes).double().log_softmax(1)
        expected = (torch.special.xlogy(reference, reference) - reference * q).sum(1).mean().item()
        assert selection.prediction.final == pytest.approx(expected, rel=1e-3)


def test_samples_that_are_not_finite_are_refused(digits):
    bad = SimpleNamespace(**vars(digits))
    x = digits.calibration.x.copy()
    x[5, 0, 3, 3] = np.nan  # which none of the three rounds looks at
    bad.calibration = replace(digits.calibration, x=x)
    with pytest.raises(InputError, match="digits@train: the network gives NaN or Inf"):
        Case.select(bad, Budget(macs=Share(0.5)))
