"""Layers that may not be narrowed, by pattern and by width."""

import numpy as np
import pytest
import torch
from torch import nn

from cahfp_cli.coupling.analysis import analyse
from cahfp_cli.errors import UsageError
from cahfp_cli.pruning.target import protected


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
