"""Selection on random workloads: budgets hold, nothing affordable is left out, errors name what can be reached."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cahfp_cli.device.catalogue import load_profile
from cahfp_cli.device.cost import compile_workload
from cahfp_cli.device.operators import Operator, Product, Workload
from cahfp_cli.device.quantities import Count, Share, parse_bytes, parse_limit, parse_seconds
from cahfp_cli.device.sizes import Axis, Size
from cahfp_cli.errors import BudgetError, UsageError
from cahfp_cli.pruning.budget import Budget, limits_of, values_of
from cahfp_cli.pruning.selection import select
from tests.support.networks import examples

NAMES = ("macs", "params", "storage", "memory", "latency")


def chain(widths, side, constant):
    """Convolutions one after the other, as wide as families and a constant say."""
    axes = [Axis(3), *(Axis(constant, ((f, 1),)) for f in range(len(widths))), Axis(10)]
    operators, parameters, buffers = [], [], [Size((Axis(3), Axis(side), Axis(side)))]
    for number in range(len(axes) - 1):
        weight = Size((axes[number + 1], axes[number], Axis(3), Axis(3)))
        output = Size((axes[number + 1], Axis(side), Axis(side)))
        product = Product(Size((Axis(side), Axis(side))), 9, axes[number], axes[number], axes[number + 1])
        operators.append(Operator(f"conv{number}", "conv", (buffers[-1],), (output,), (weight,), product))
        parameters.append((weight, 4))
        buffers.append(output)
    live = tuple((number, number + 1) for number in range(len(operators)))
    return Workload(tuple(operators), len(widths), tuple(widths), tuple(parameters), tuple(buffers), live)


@st.composite
def problems(draw):
    """Significance (with ties), family of each group, a cost model."""
    widths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    workload = chain(widths, draw(st.sampled_from([2, 5])), draw(st.integers(0, 2)))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    family = rng.permutation(np.repeat(np.arange(len(widths)), widths))
    significance = rng.choice([0.0, 0.5, 1.0, *rng.random(5)], len(family))
    profile = load_profile(draw(st.sampled_from(["raspberry-pi-4", "jetson-nano"])))
    return significance, family, compile_workload(workload, profile)


@st.composite
def budgets(draw, model):
    """One to three limits between the narrowest and the full network, and perhaps a share to keep."""
    full = np.array(model.workload.full_widths)
    low, high = model.cost(np.minimum(full, 1)), model.cost(full)
    limits = {}
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)):
        share = draw(st.floats(0, 1))
        value = float(values_of(low, name)) + share * float(values_of(high, name) - values_of(low, name))
        if name in ("macs", "params"):
            limits[name] = Count(int(np.ceil(value)))
        else:
            limits[name] = value if name == "latency" else int(np.ceil(value))
    return Budget(**limits, keep=draw(st.none() | st.floats(0.1, 1)))


def widths_of(kept, family, model):
    return np.bincount(family[kept], minlength=model.workload.families)


def most(model, keep):
    full = np.array(model.workload.full_widths)
    return np.maximum(np.floor(full * (keep or 1.0) + 0.5), 1).astype(int)


@given(data=st.data(), problem=problems())
@examples(150)
def test_every_budget_holds_and_nothing_affordable_is_left_out(data, problem):
    significance, family, model = problem
    budget = data.draw(budgets(model))
    found = select(significance, family, model, budget)
    widths = widths_of(found.kept, family, model)
    assert (widths >= 1).all()
    assert (widths <= most(model, budget.keep)).all()
    limits = limits_of(budget, model.cost(np.array(model.workload.full_widths)))
    for name, limit in limits.by_name.items():
        assert values_of(found.cost, name) == values_of(model.cost(widths), name) <= limit
    for f in np.flatnonzero(widths < most(model, budget.keep)):
        wider = widths.copy()
        wider[f] += 1
        assert any(values_of(model.cost(wider), name) > limit for name, limit in limits.by_name.items())


@given(data=st.data(), problem=problems())
@examples(60)
def test_inside_a_family_the_most_significant_groups_stay_and_ties_go_to_the_lower_number(data, problem):
    significance, family, model = problem
    kept = select(significance, family, model, data.draw(budgets(model))).kept
    for f in range(model.workload.families):
        ranked = sorted(np.flatnonzero(family == f), key=lambda group: (-significance[group], group))
        assert sorted(ranked[: kept[ranked].sum()]) == [group for group in sorted(ranked) if kept[group]]


@given(data=st.data(), problem=problems())
@examples(60)
def test_a_selection_is_deterministic_and_does_not_depend_on_the_unit_of_significance(data, problem):
    significance, family, model = problem
    budget = data.draw(budgets(model))
    first = select(significance, family, model, budget)
    assert np.array_equal(first.kept, select(significance.copy(), family.copy(), model, budget).kept)
    assert np.array_equal(first.kept, select(significance * 8, family, model, budget).kept)


@given(data=st.data(), problem=problems(), factor=st.floats(1, 4))
@examples(100)
def test_a_larger_budget_is_never_smaller_than_what_fitted_before(data, problem, factor):
    """What must hold for a greedy choice: with one limit only (several trade places), the larger budget is used at
    least as far as the smaller one, up to one group; with `keep` alone every family grows."""
    significance, family, model = problem
    keep = data.draw(st.floats(0.05, 1))
    small, large = (select(significance, family, model, Budget(keep=k)) for k in (keep, min(1.0, keep * factor)))
    assert (large.kept >= small.kept).all()
    if len(model.workload.full_widths) == 1:
        budget = data.draw(budgets(model))
        wider = replace(
            budget,
            macs=budget.macs and Count(int(budget.macs.value * factor)),
            params=budget.params and Count(int(budget.params.value * factor)),
            **{n: getattr(budget, n) and getattr(budget, n) * factor for n in ("storage", "memory", "latency")},
        )
        small, large = (select(significance, family, model, b) for b in (budget, wider))
        assert (large.kept >= small.kept).all()


@given(problem=problems(), name=st.sampled_from(NAMES))
@examples(100)
def test_the_smallest_reachable_value_can_be_passed_back_and_one_unit_less_cannot(problem, name):
    significance, family, model = problem
    parse = {"macs": parse_limit, "params": parse_limit, "latency": parse_seconds}.get(name, parse_bytes)
    tiny = {"macs": Count(1), "params": Count(1), "latency": 1e-12}.get(name, 1)
    with pytest.raises(BudgetError, match="cannot be met even with the fewest channels a layer") as error:
        select(significance, family, model, Budget(**{name: tiny}))
    text = re.search(r"smallest reachable: ([^)]+)\)", str(error.value))[1].replace(" ", "")
    found = select(significance, family, model, Budget(**{name: parse(text)}))
    assert (found.kept.sum() >= model.workload.families).all()
    number = re.match(r"[\d.]+", text)[0]
    digits = len(number.partition(".")[2])
    less = f"{float(number) - 10**-digits:.{digits}f}{text[len(number) :]}"
    with pytest.raises((BudgetError, UsageError)):  # the latter for nothing at all, which is no budget
        select(significance, family, model, Budget(**{name: parse(less)}))


def test_two_limits_that_cannot_be_met_are_both_named():
    model = compile_workload(chain([4, 4], 5, 0), None)
    with pytest.raises(BudgetError, match=r"macs 1 \(smallest.*params 2 \(smallest"):
        select(np.ones(8), np.repeat([0, 1], 4), model, Budget(macs=Count(1), params=Count(2)))


def test_shares_are_of_the_full_network_and_the_binding_limit_is_named():
    model = compile_workload(chain([8, 8], 5, 0), None)
    found = select(np.arange(16.0), np.repeat([0, 1], 8), model, Budget(macs=Share(0.3), params=Share(0.99)))
    assert found.limits.by_name["macs"] == 0.3 * float(found.full.macs)
    assert found.binding == "macs"
    assert found.cost.macs <= 0.3 * found.full.macs


def test_the_whole_network_is_kept_where_it_fits():
    model = compile_workload(chain([5], 2, 1), None)
    assert select(np.ones(5), np.zeros(5, int), model, Budget(params=Share(1.0))).kept.all()


def test_a_network_without_groups_fits_or_does_not():
    model = compile_workload(chain([], 2, 1), None)
    nothing = np.zeros(0)
    assert select(nothing, nothing.astype(int), model, Budget(params=Share(1.0))).kept.shape == (0,)
    with pytest.raises(BudgetError):
        select(nothing, nothing.astype(int), model, Budget(params=Share(0.5)))


def test_a_latency_budget_without_a_device_is_a_mistake_of_the_caller():
    model = compile_workload(chain([4], 2, 0), None)
    with pytest.raises(ValueError, match="needs a device"):
        select(np.ones(4), np.zeros(4, int), model, Budget(latency=1.0))
