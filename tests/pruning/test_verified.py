"""Selection by measurement, on devices that are slower or faster than they are predicted to be."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cahfp_cli.errors import BudgetError
from cahfp_cli.pruning.budget import Budget, Limits
from cahfp_cli.pruning.selection import Selection
from cahfp_cli.pruning.verified import CLOSE, TRIES, select_verified

WIDTH = 100
"""Groups of the network, of which each takes a microsecond by prediction."""


def select(budget: Budget) -> Selection:
    width = min(int(budget.latency * 1e6), WIDTH)
    if width < 10:
        raise BudgetError("too little")
    limits = Limits({"latency": budget.latency})
    binding = "latency"
    return Selection(np.arange(WIDTH) < width, SimpleNamespace(), SimpleNamespace(), limits, binding)


def device(factor: float, floor: float = 0.0):
    return lambda selection: floor + factor * 1e-6 * int(selection.kept.sum())


@given(factor=st.floats(0.5, 2.5), limit=st.floats(40e-6, 90e-6))
def test_the_measured_latency_holds_and_is_close_to_the_limit(factor: float, limit: float) -> None:
    found = select_verified(Budget(latency=limit), select, device(factor))
    assert found.seconds <= limit
    assert found.seconds >= 0.85 * limit or found.selection.kept.all()
    assert found.selection.limits.by_name["latency"] == limit
    assert 1 <= found.tries <= TRIES


@given(seed=st.integers(0, 10**6), jump=st.integers(20, 80), limit=st.floats(30e-6, 90e-6))
@example(seed=251, jump=20, limit=3.035e-05)  # from either side of the jump back to the other, eight times
def test_a_device_that_jumps_and_whose_measurements_err_is_bisected(seed: int, jump: int, limit: float) -> None:
    random = np.random.default_rng(seed)

    def measure(selection: Selection) -> float:
        width = int(selection.kept.sum())
        return float(1e-6 * (width + 25 * (width > jump)) * random.uniform(1, 1.04))

    found = select_verified(Budget(latency=limit), select, measure)
    assert found.seconds <= limit
    above = limit >= 1.05 * (jump + 26) * 1e-6  # whether a network beyond the jump fits, whatever the error
    assert found.seconds >= 0.85 * (limit if above else min(limit, jump * 1e-6))


def test_where_the_proportion_goes_in_circles_the_middle_is_tried() -> None:
    aims = []

    def noted(budget: Budget) -> Selection:
        aims.append(round(budget.latency * 1e6, 3))
        return select(budget)

    found = select_verified(
        Budget(latency=50e-6), noted, lambda selection: 1e-6 * (30 if selection.kept.sum() < 45 else 60)
    )
    assert found.seconds == pytest.approx(30e-6)
    assert aims[:3] == [50.0, 40.833, pytest.approx(45.417, abs=1e-3)]
    assert len(aims) == TRIES
    assert max(aims[3:]) < 45.5


def test_a_prediction_that_is_right_is_measured_once() -> None:
    found = select_verified(Budget(latency=50.5e-6), select, device(1.0))
    assert (found.tries, int(found.selection.kept.sum())) == (1, 50)
    assert found.seconds >= CLOSE * 50.5e-6


def test_a_disturbed_measurement_is_taken_again() -> None:
    seen = iter([80e-6, 48e-6])
    found = select_verified(Budget(latency=50e-6), select, lambda selection: next(seen))
    assert (found.tries, found.seconds) == (1, 48e-6)


def test_of_several_that_hold_the_slowest_is_taken() -> None:
    seen = iter([30e-6, 42e-6, 39e-6, *[60e-6] * 2 * TRIES])
    found = select_verified(Budget(latency=50e-6), select, lambda selection: next(seen))
    assert found.seconds == 42e-6


def test_a_device_that_never_holds_is_a_budget_that_cannot_be_met() -> None:
    with pytest.raises(BudgetError, match=r"no submodel was measured within 50 us; the fastest took 1\d\d us"):
        select_verified(Budget(latency=50e-6), select, device(1.0, floor=100e-6))


def test_a_budget_below_the_narrowest_network_says_so_itself() -> None:
    with pytest.raises(BudgetError, match="too little"):
        select_verified(Budget(latency=5e-6), select, device(1.0))
    with pytest.raises(ValueError, match="no latency"):
        select_verified(Budget(keep=0.5), select, device(1.0))
