"""The terms of the bound against a brute force on a tiny network in float64."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cahfp_cli.data.dataset import Dataset
from cahfp_cli.federation.bound import Part, measured, terms
from cahfp_cli.federation.simulation import simulate
from tests.support.experiments import PROVENANCE, experiment

SIZES, HIDDEN, LR, SIZE = (12, 7, 9), 4, 0.1, 5
KEPT = {0: [0, 2], 2: [0, 1, 2]}
"""Hidden units of the clients that take part."""
STEPS = {0: 6, 2: 4}


def network(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 2)).double().eval()


def dataset(count: int, seed: int) -> Dataset:
    random = np.random.default_rng(seed)
    return Dataset(random.normal(size=(count, 3)) + seed, random.integers(0, 2, count), 2, "random")


def axes_of(units: list[int]) -> dict[str, tuple[np.ndarray | None, ...]]:
    own = None if len(units) == HIDDEN else np.array(units, np.int32)
    return {"0.weight": (own, None), "0.bias": (own,), "2.weight": (None, own), "2.bias": (None,)}


def cut(full: nn.Sequential, units: list[int]) -> nn.Sequential:
    small, state = network(len(units)), full.state_dict()
    state = {"0.weight": state["0.weight"][units], "0.bias": state["0.bias"][units]} | {
        "2.weight": state["2.weight"][:, units],
        "2.bias": state["2.bias"],
    }
    small.load_state_dict(state)
    return small


def zeroed(full: nn.Sequential, units: list[int]) -> nn.Sequential:
    """The whole network with 0 in every entry of the other units."""
    other = [unit for unit in range(HIDDEN) if unit not in units]
    masked = network(HIDDEN)
    masked.load_state_dict(full.state_dict())
    with torch.no_grad():
        masked[0].weight[other] = 0
        masked[0].bias[other] = 0
        masked[2].weight[:, other] = 0
    return masked


def gradient(model: nn.Module, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """One vector, all parameters after one another."""
    model.zero_grad()
    nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
    return np.concatenate([p.grad.numpy().reshape(-1) for p in model.parameters()])  # type: ignore[union-attr]


def loss(model: nn.Module, data: Dataset) -> float:
    return float(nn.functional.cross_entropy(model(torch.from_numpy(data.x)), torch.from_numpy(data.y)).detach())


def test_every_term_equals_the_brute_force_in_float64() -> None:
    torch.manual_seed(0)
    full, after = network(HIDDEN), network(HIDDEN)
    data = {client: dataset(count, client) for client, count in enumerate(SIZES)}
    parts = {c: Part(cut(full, units), axes_of(units), STEPS[c]) for c, units in KEPT.items()}
    found = terms(full, data, parts, after, LR, SIZE)

    p = {client: len(own) / sum(SIZES) for client, own in data.items()}
    q = {client: len(data[client]) / (SIZES[0] + SIZES[2]) for client in KEPT}
    own = {client: gradient(full, d.x, d.y) for client, d in data.items()}
    mean = sum(p[c] * own[c] for c in data)
    noise = 0.0
    for client, d in data.items():
        order = np.random.default_rng(0).permutation(len(d))
        for start in range(0, len(d), SIZE):
            batch = order[start : start + SIZE]
            deviation = gradient(full, d.x[batch], d.y[batch]) - own[client]
            noise += p[client] * len(batch) / len(d) * float(deviation @ deviation)
    pruned = {c: gradient(zeroed(full, units), data[c].x, data[c].y) for c, units in KEPT.items()}
    nobody = np.concatenate(  # hidden unit 3: its row, its bias, its column
        [np.repeat(np.arange(4) == 3, 3), np.arange(4) == 3, np.tile(np.arange(4) == 3, 2), [False, False]]
    )
    before = sum(p[c] * loss(full, d) for c, d in data.items())
    steps = sum(q[c] * STEPS[c] for c in KEPT)
    expected = {
        "loss": before,
        "gradient": mean @ mean,
        "optimisation": (before - sum(p[c] * loss(after, d) for c, d in data.items())) / (LR * steps),
        "noise": noise,
        "dissimilarity": sum(p[c] * (own[c] - mean) @ (own[c] - mean) for c in data),
        "pruning": sum(q[c] * (own[c] - pruned[c]) @ (own[c] - pruned[c]) for c in KEPT),
        "uncovered": (mean * nobody) @ (mean * nobody),
    }
    assert min(expected[name] for name in expected if name != "optimisation") > 1e-6
    assert asdict(found) == pytest.approx(expected, rel=1e-10)


def test_in_a_round_without_replies_all_of_the_gradient_is_uncovered() -> None:
    torch.manual_seed(0)
    full = network(HIDDEN)
    found = terms(full, {0: dataset(8, 0)}, {}, full, LR, SIZE)
    assert found.uncovered == found.gradient > 0
    assert found.optimisation == found.pruning == 0.0 == found.dissimilarity


def test_one_batch_of_all_samples_has_no_noise() -> None:
    torch.manual_seed(0)
    assert measured(network(HIDDEN), dataset(8, 1), 8).noise == 0.0


def test_rounds_carry_the_terms_only_on_request_and_are_otherwise_the_same(tmp_path: Path) -> None:
    asked = {"methods": ["heterofl", "fedavg-smallest"], "rounds": 2}
    plain = simulate(experiment(**asked), tmp_path / "plain", PROVENANCE)
    runs = simulate(experiment(**asked, evaluation={"bound_terms": True}), tmp_path / "bound", PROVENANCE)
    for one, other in zip(runs, plain, strict=True):
        for row, without in zip(one.rows, other.rows, strict=True):
            found = row["bound"]
            assert "bound" not in without
            assert row["bound_missing"] is None
            assert {k: v for k, v in row.items() if k not in ("bound", "bound_missing", "seconds")} == {
                k: v for k, v in without.items() if k != "seconds"
            }
            assert all(np.isfinite(value) for value in found.values())
            assert found["noise"] > 0 and found["dissimilarity"] > 0 and found["pruning"] > 0
            assert (found["uncovered"] > 0) == (one.method == "fedavg-smallest")
