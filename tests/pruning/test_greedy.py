"""Greedy removal on random costs and Jacobians: limits hold, nothing that fits is left out, sets are seen as sets."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cahfp_cli.coupling.analysis import analyse
from cahfp_cli.device.catalogue import load_profile
from cahfp_cli.device.cost import compile_workload
from cahfp_cli.errors import BudgetError
from cahfp_cli.pruning import greedy
from cahfp_cli.pruning.budget import Budget, Limits, values_of
from cahfp_cli.pruning.greedy import Narrowing, exceeded, narrowings, remove_to_fit
from cahfp_cli.pruning.linearised import Linearised, Quadratic
from cahfp_cli.pruning.selection import select, strongest
from cahfp_cli.pruning.target import Target
from cahfp_cli.significance.gates import GateJacobian
from tests.device.test_latency import calibrated
from tests.device.test_latency import made_up as made_up_rates
from tests.pruning.test_linearised import linearised, made_up
from tests.pruning.test_selection import NAMES, chain, problems
from tests.support.networks import examples


@st.composite
def targets(draw, model, widths):
    """Up to three limits between the narrowest network and the one of these widths, and bounds of the widths."""
    least = np.array([draw(st.integers(1, max(1, width // 2))) for width in widths])
    most = np.array([draw(st.integers(low, width)) for low, width in zip(least, widths, strict=True)])
    low, high = model.cost(least), model.cost(widths)
    limits = {}
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True)):
        share, smallest = draw(st.floats(0, 1)), float(values_of(low, name))
        limits[name] = smallest + share * (float(values_of(high, name)) - smallest)
    return Target(Limits(limits), least, most)


@st.composite
def starts(draw):
    """A cost model, the family of each group that is left, widths, a target that can be met, a fresh removal."""
    _, family, model = draw(problems())
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    left = random.random(len(family)) < 0.8
    left[np.unique(family, return_index=True)[1]] = True  # at least one of each
    family = family[left]
    widths = np.bincount(family, minlength=model.workload.families)
    seed, quadratic = draw(st.integers(0, 2**16)), draw(st.booleans())

    def fresh():
        start = made_up(seed, len(family))
        return Quadratic.of(start) if quadratic else start

    return model, family, widths, draw(targets(model, widths)), fresh


def widths_of(removal, family, model):
    return np.bincount(family[removal.alive.numpy()], minlength=model.workload.families)


def check(model, family, widths, target, removal):
    """All that must hold of a result."""
    before = widths.copy()
    found = remove_to_fit(removal, family, model, widths, target)
    assert np.array_equal(widths, before)
    assert found.tolist() == widths_of(removal, family, model).tolist()
    assert exceeded(model, found, target.limits) == []
    for name, limit in target.limits.by_name.items():
        assert float(values_of(model.cost(found), name)) <= limit
    assert (found >= target.least).all() and (found <= target.most).all()
    for number in np.flatnonzero((found < widths) & (found < target.most)):
        wider = found + (np.arange(len(found)) == number)
        assert exceeded(model, wider, target.limits)  # nothing that was taken out can be put back
    return found


@given(start=starts())
@examples(150)
def test_every_limit_holds_and_nothing_that_was_removed_can_be_put_back(start):
    model, family, widths, target, fresh = start
    check(model, family, widths, target, fresh())


@given(start=starts(), at_once=st.integers(1, 6))
@examples(60)
def test_so_it_is_when_a_step_removes_several_groups(start, at_once):
    model, family, widths, target, fresh = start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "AT_ONCE", at_once)
        check(model, family, widths, target, fresh())


@given(start=starts())
@examples(40)
def test_the_same_start_gives_the_same_groups(start):
    model, family, widths, target, fresh = start
    first, second = fresh(), fresh()
    for removal in (first, second):
        remove_to_fit(removal, family.copy(), model, widths.copy(), target)
    assert torch.equal(first.alive, second.alive)
    assert first.divergence() == second.divergence()


@given(start=starts())
@examples(40)
def test_nothing_is_removed_where_everything_fits(start):
    model, family, widths, target, fresh = start
    removal = fresh()
    loose = {name: float(values_of(model.cost(widths), name)) for name in target.limits.by_name}
    found = remove_to_fit(removal, family, model, widths, Target(Limits(loose), target.least, widths))
    assert found.tolist() == widths.tolist() and removal.alive.all()


@given(seed=st.integers(0, 2**16), widths=st.lists(st.integers(1, 6), min_size=1, max_size=3))
@examples(40)
def test_without_a_limit_each_step_takes_the_group_of_least_loss_in_a_family_that_is_too_wide(seed, widths):
    model = compile_workload(chain(widths, 2, 1), None)
    family = np.repeat(np.arange(len(widths)), widths)
    most = np.maximum(1, np.array(widths) // 2)
    found, expected = made_up(seed, len(family)), made_up(seed, len(family))
    remove_to_fit(found, family, model, np.array(widths), Target(Limits({}), np.ones_like(most), most))
    while ((left := widths_of(expected, family, model)) > most).any():
        open_groups = np.flatnonzero(expected.alive.numpy() & (left > most)[family])
        short = [  # of each family those with the least estimates
            g
            for f in np.unique(family[open_groups])
            for g in sorted(open_groups[family[open_groups] == f], key=lambda g: float(expected.estimate()[g]))[:3]
        ]
        loss = expected.together(list(torch.tensor(short)[:, None])).numpy()
        expected.remove(short[int(np.argmin(loss))])
    assert torch.equal(found.alive, expected.alive)


def test_savings_are_shares_of_the_limits_that_are_exceeded():
    model = compile_workload(chain([6, 8], 5, 0), None)
    widths, least = np.array([5, 8]), np.array([5, 2])
    limits = Limits({"macs": 1000.0, "params": 50.0, "storage": 1e9})
    (found,) = narrowings(model, widths, Target(limits, least, widths), ["macs", "params"])
    now, then = model.cost(widths), model.cost(np.array([5, 7]))
    expected = float(now.macs - then.macs) / 1000 + float(now.params - then.params) / 50
    assert (found.family, found.groups, found.saving) == (1, 1, pytest.approx(expected, rel=1e-12))


# --- alignment -------------------------------------------------------------------------------------------------------

STEP = 16


def aligned():
    """A device that computes 16 channels at once and whose memory is so fast that only computing takes time."""
    profile = load_profile("jetson-orin-nano")
    alignment = profile.alignment.model_copy(update={"step": profile.alignment.step.model_copy(update={"value": 16.0})})
    bandwidth = profile.memory.bandwidth.model_copy(update={"value": 1e12})
    return profile.model_copy(
        update={"alignment": alignment, "memory": profile.memory.model_copy(update={"bandwidth": bandwidth})}
    )


def test_a_family_goes_to_the_next_step_where_fewer_groups_save_nothing():
    full = np.array([40, 64, 23])
    model = compile_workload(chain(full.tolist(), 8, 0), aligned())
    target = Target(Limits({"latency": 1e-3}), np.array([1, 1, 20]), full)

    def seconds(*widths):
        return float(model.cost(np.array(widths)).latency_seconds)

    saved = {(way.family, way.groups): way.saving for way in narrowings(model, full, target, ["latency"])}
    assert seconds(39, 64, 23) == pytest.approx(seconds(40, 64, 23), rel=1e-9)
    assert saved[0, 8] == pytest.approx((seconds(40, 64, 23) - seconds(32, 64, 23)) / 1e-3, rel=1e-9)
    assert saved[1, 16] == pytest.approx((seconds(40, 64, 23) - seconds(40, 48, 23)) / 1e-3, rel=1e-9)
    assert max(groups for family, groups in saved if family == 2) <= 3  # no further than it may go


def test_where_nothing_saves_anything_one_group_of_each_family_is_a_way():
    model = compile_workload(chain([40, 64], 8, 0), aligned())
    target = Target(Limits({"storage": math.inf}), np.array([1, 64]), np.array([40, 64]))
    assert narrowings(model, np.array([40, 64]), target, ["storage"]) == [Narrowing(0, 1, 1.0)]


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.7, 0.9])
def test_where_latency_alone_binds_widths_lie_on_steps_or_are_full(share):
    full = np.array([40, 64, 23])
    model = compile_workload(chain(full.tolist(), 8, 0), aligned())
    assert model.alignment == STEP
    family, least = np.repeat(np.arange(3), full), np.ones(3, dtype=np.int64)
    low, high = (float(model.cost(widths).latency_seconds) for widths in (least, full))
    removal = made_up(0, len(family))
    target = Target(Limits({"latency": low + share * (high - low)}), least, full)
    found = check(model, family, full, target, removal)
    assert (found < full).any()
    assert ((found % STEP == 0) | (found == full) | (found < STEP)).all()  # below a step, every channel counts


CALIBRATED = calibrated(made_up_rates(3, 4e6), STEP, 4)


@given(full=st.lists(st.integers(4, 60), min_size=1, max_size=3), share=st.floats(0.05, 0.95), seed=st.integers(0, 99))
@examples(40)
def test_where_odd_widths_are_slow_none_is_left_that_could_be_settled(full, share, seed):
    model, full = compile_workload(chain(full, 8, 0), CALIBRATED), np.array(full)
    family, least = np.repeat(np.arange(len(full)), full), np.ones(len(full), dtype=np.int64)
    low, high = (float(model.cost(model.settled(widths)).slow_seconds) for widths in (least, full))
    target = Target(Limits({"latency": low + share * max(high - low, 0.0)}), least, full)
    removal = made_up(seed, len(family))
    found = remove_to_fit(removal, family, model, full, target)
    assert np.array_equal(found, np.bincount(family[removal.alive.numpy()], minlength=len(full)))
    assert np.array_equal(model.settled(found), found)
    assert not exceeded(model, found, target.limits)
    significance = np.random.default_rng(seed).random(len(family))
    chosen = select(significance, family, model, Budget(latency=target.limits.by_name["latency"]))
    widths = np.bincount(family[chosen.kept], minlength=len(full))
    assert np.array_equal(model.settled(widths), widths)
    assert not exceeded(model, widths, target.limits)


def test_where_only_widths_that_are_not_allowed_are_fast_enough_that_is_an_error():
    model = compile_workload(chain([12], 8, 0), None)
    target = Target(Limits({"macs": float(model.cost(np.array([6])).macs)}), np.array([7]), np.array([7]))
    with pytest.raises(BudgetError, match="macs"):
        remove_to_fit(made_up(0, 12), np.zeros(12, int), model, np.array([12]), target)


# --- sets ------------------------------------------------------------------------------------------------------------

PAIRS, CLASSES = 5, 12


def pairs():
    """A network in which channels come in pairs that are the same in everything, each about as significant as the
    others; the pair of each group; samples."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 2 * PAIRS), nn.Tanh(), nn.Linear(2 * PAIRS, CLASSES)).double().eval()
    groups = analyse(model, (8,), torch.float64).groups
    order, half = groups.labels["0.weight"][0], torch.arange(PAIRS)
    pair, x = np.empty(2 * PAIRS, dtype=int), torch.randn(200, 8, dtype=torch.float64)
    pair[order] = np.arange(2 * PAIRS) % PAIRS
    with torch.no_grad():
        nn.init.orthogonal_(model[2].weight)
        for tensor, axis in ((model[0].weight, 0), (model[0].bias, 0), (model[2].weight, 1)):
            tensor.index_copy_(axis, half + PAIRS, tensor.index_select(axis, half).clone())
    curvature = linearised(model, groups, x).curvature()[torch.from_numpy(order)]
    model[2].weight.data /= curvature.sqrt() * torch.linspace(2, 2.2, PAIRS).repeat(2)
    return model, groups, pair, x


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
@pytest.mark.parametrize("count", range(1, PAIRS + 1))
def test_of_twins_one_goes_before_both_of_any_where_scores_of_single_groups_take_both(kind, count):
    model, groups, pair, x = pairs()
    start = linearised(model, groups, x)
    diagonal = start.curvature().numpy()
    removal = start if kind == "linear" else Quadratic.of(start)
    cost = compile_workload(chain([2 * PAIRS], 2, 0), None)
    full, most = np.array([2 * PAIRS]), np.array([2 * PAIRS - count])
    remove_to_fit(removal, groups.family, cost, full, Target(Limits({}), np.ones(1, int), most))
    gone = pair[~removal.alive.numpy()]
    assert len(gone) == len(set(gone)) == count
    alone = pair[~strongest(diagonal, groups.family, most)]
    assert len(set(alone)) == -(-count // 2)  # twins have the same score, so that they go together


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_of_two_channels_that_cancel_the_second_goes_at_a_gain(kind):
    base = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits, other = torch.zeros(30, 3, dtype=torch.float64), base.roll(1, 0)
    start = Linearised(GateJacobian(logits, torch.stack([base, -1.1 * base, 1.05 * other], 2)), logits.softmax(1))
    assert start.curvature().argsort().tolist() == [0, 2, 1]  # one by one, the first and the last would go
    removal = start if kind == "linear" else Quadratic.of(start)
    cost = compile_workload(chain([3], 2, 0), None)
    remove_to_fit(removal, np.zeros(3, int), cost, np.array([3]), Target(Limits({}), np.ones(1, int), np.array([1])))
    assert removal.alive.tolist() == [False, False, True]
    assert removal.divergence() < 0.02 * float(start.curvature()[0])
