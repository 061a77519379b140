"""Whatever a network draws from follows the seed, and is put back."""

import random

import numpy as np
import torch
from torch import nn

from cahfp_cli.data.dataset import Dataset
from cahfp_cli.models.random_streams import random_streams
from cahfp_cli.running.device import repeatable
from cahfp_cli.running.evaluation import evaluate

CPU = torch.device("cpu")


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_every_stream_follows_the_seed_and_is_put_back() -> None:
    for seed in (0, 5):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        undisturbed = drawn(), drawn()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        assert drawn() == undisturbed[0]
        with random_streams(seed):
            first = drawn()
        with repeatable(seed, CPU):
            assert drawn() == first
        assert drawn() == undisturbed[1]
    with random_streams(0):
        assert drawn() != first


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + random.random() + torch.rand_like(x) + torch.as_tensor(np.random.rand(x.shape[1]), dtype=x.dtype)


def test_evaluating_a_network_that_draws_gives_the_same_twice() -> None:
    rng = np.random.default_rng(0)
    data = Dataset(rng.normal(size=(30, 4)).astype(np.float32), rng.integers(0, 4, 30), 4, "rows")
    assert evaluate(Noisy(), data, 7, CPU) == evaluate(Noisy(), data, 7, CPU)
