"""Masks with memory: widths of the new mask, little of the old one exchanged."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cahfp_cli.federation.memory import Memory, limited


@given(seed=st.integers(0, 10**6), churn=st.floats(0, 1))
def test_a_limited_mask_has_the_new_widths_and_exchanges_no_more_than_it_may(seed: int, churn: float) -> None:
    random = np.random.default_rng(seed)
    family = np.repeat(np.arange(3), (5, 9, 14))
    old, wanted, worth = random.random(28) < 0.5, random.random(28) < 0.5, random.random(28)
    found = limited(old, wanted, worth, family, churn)
    for number in range(3):
        own = family == number
        width, before = int(wanted[own].sum()), int(old[own].sum())
        assert found[own].sum() == width
        assert (found & ~old & own).sum() <= max(int(churn * width), width - before)
    assert not (found & ~old & ~wanted).any()


def test_a_mask_that_may_change_wholly_is_the_wanted_one_where_that_has_the_best() -> None:
    family, worth = np.zeros(6, np.int64), np.array([1.0, 2, 3, 4, 5, 6])
    old, wanted = worth <= 3, worth > 3
    assert (limited(old, wanted, worth, family, 1.0) == wanted).all()
    assert limited(old, wanted, worth, family, 0.4).tolist() == [False, True, True, False, False, True]


def test_scores_are_moving_averages_of_unit_mean_and_mixed() -> None:
    memory = Memory.new(np.ones((2, 2), np.bool_))
    assert memory.significance(0, 0.5) is None
    memory = memory.with_score(0, np.array([1.0, 3.0]), 0, decay=0.5).with_score(
        0, np.array([30.0, 10.0]), 1, decay=0.5
    )
    assert memory.significance(0, 0.0).tolist() == [1.0, 1.0]
    memory = memory.with_score(1, np.array([0.0, 4.0]), 1, decay=0.5)
    assert memory.significance(1, 0.0).tolist() == [0.0, 2.0]
    assert memory.significance(1, 1.0).tolist() == [0.5, 1.5]
    assert memory.significance(1, 0.5).tolist() == [0.25, 1.75]
