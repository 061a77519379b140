"""Layers that may not be narrowed, by pattern and by width."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from cahfp_cli.coupling.analysis import analyse
from cahfp_cli.device.cost import compile_workload
from cahfp_cli.device.latency import CLASSES
from cahfp_cli.errors import BudgetError, UsageError
from cahfp_cli.pruning.budget import Budget, values_of
from cahfp_cli.pruning.target import protected, quickest, target_of
from tests.device.test_latency import calibrated, made_up
from tests.pruning.test_selection import chain


@pytest.fixture(scope="module")
def groups():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    return analyse(model, (4,)).groups


def test_excluded_layers_keep_all_and_others_a_least_width(groups):
    assert groups.names == ("0.weight", "2.weight")
    assert protected(groups, [], 1).narrowest.tolist() == groups.narrowest.tolist()
    assert protected(groups, ["2.*"], 4).narrowest.tolist() == [4, 6]
    assert protected(groups, ["*"], 1).narrowest.tolist() == [9, 6]
    assert protected(groups, [], 7).narrowest.tolist() == [7, 6]  # no wider than the layer
    assert np.array_equal(groups.narrowest, protected(groups, [], 1).narrowest)


def test_a_pattern_that_names_nothing_is_refused_with_the_nearest(groups):
    with pytest.raises(UsageError, match=r"did you mean '2\.weight'"):
        protected(groups, ["2.weights"], 1)


def narrow_is_slow(widths):
    """A device on which convolutions of fewer inputs than a block of 16 take five times as long."""
    rates = made_up(3, 4e6)
    operation, byte, overhead = rates.operation.copy(), rates.byte.copy(), np.full_like(rates.overhead, 1e-7)
    operation[:], byte[:] = 1e-11, 1e-11
    operation[CLASSES.index("narrow")] = 5e-10
    rates = replace(rates, operation=operation, byte=byte, overhead=overhead)
    return compile_workload(chain(widths, 8, 0), calibrated(rates, 16, 4))


def test_the_quickest_network_is_that_of_all_aligned_ones():
    model = narrow_is_slow([24, 64, 40])
    found = quickest(model, np.array([1, 1, 5]))
    every = np.array([w for w in product(*(range(4, full + 1, 4) for full in (24, 64, 40))) if w[2] >= 5])
    seconds = values_of(model.cost(every, memory=False), "latency")
    assert float(values_of(model.cost(found), "latency")) == pytest.approx(float(seconds.min()), rel=1e-12)
    assert (found == 16).any()  # narrower is slower
    assert quickest(compile_workload(chain([24, 64], 8, 0), None), np.array([1, 2])).tolist() == [1, 2]


def test_a_budget_that_the_whole_network_meets_is_met_though_the_narrowest_is_slower():
    model = narrow_is_slow([16, 16, 16])
    narrow = float(values_of(model.cost(np.array([4, 4, 4])), "latency"))
    whole = float(values_of(model.full, "latency"))
    assert narrow > whole
    assert target_of(Budget(latency=whole * 1.001), model).least.tolist() == [16, 16, 16]
    with pytest.raises(BudgetError, match="smallest reachable"):
        target_of(Budget(latency=whole * 0.9), model)
