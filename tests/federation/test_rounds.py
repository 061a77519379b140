"""Rounds on one harness: fair, safe against bad replies, and the same when taken up again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cahfp_cli.checkpoint.digest import content_digest
from cahfp_cli.errors import InputError
from cahfp_cli.federation.client import Reply, Task, Trainer, train_client
from cahfp_cli.federation.methods import METHODS
from cahfp_cli.federation.simulation import simulate
from tests.federation.small import PROVENANCE, experiment

SECONDS = "seconds"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def finals(folder: Path) -> dict[str, str]:
    """Content digest of the final checkpoint of each run, by its folder."""
    found = sorted(folder.glob("runs/*/*/*/final.safetensors"))
    return {str(path.parent.relative_to(folder)): content_digest(path) for path in found}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


def without_seconds(runs: Any) -> list[Any]:
    return [[{k: v for k, v in row.items() if k != SECONDS} for row in run.rows] for run in runs]


def test_with_devices_of_full_size_all_methods_are_fedavg_bit_for_bit(tmp_path: Path) -> None:
    asked = experiment(methods=list(METHODS), fleet=[{"count": 4, "keep": 1.0}], clients_per_round=3, rounds=3)
    runs = simulate(asked, tmp_path / "out", PROVENANCE)
    digests = finals(tmp_path / "out")
    assert len(digests) == len(METHODS)
    accuracies = {run.method: run.rows[-1]["accuracy"] for run in runs}
    assert all(found == accuracies["fedavg"] for found in accuracies.values())
    assert len(set(digests.values())) == 1


class KilledError(Exception):
    pass


def test_a_killed_run_that_is_resumed_gives_the_bytes_of_an_uninterrupted_one(tmp_path: Path) -> None:
    asked = experiment(methods=["heterofl", "cahfp"], rounds=4, evaluation={"every": 2})
    whole = simulate(asked, tmp_path / "whole", PROVENANCE)
    for at in (3, 22):
        calls = 0

        def killed(task: Task, at: int = at) -> Reply:
            nonlocal calls
            calls += 1
            if calls > at:
                raise KilledError
            return train_client(task)

        output = tmp_path / f"killed{at}"
        with pytest.raises(KilledError):
            simulate(asked, output, PROVENANCE, trainer=killed)
        resumed = simulate(asked, output, PROVENANCE, resume=True)
        assert files(output) == files(tmp_path / "whole")
        assert without_seconds(resumed) == without_seconds(whole)


def spoil(reply: Reply, how: Callable[[np.ndarray], np.ndarray]) -> Reply:
    name = next(name for name, array in reply.arrays.items() if array.ndim == 4)
    return replace(reply, arrays={**reply.arrays, name: how(reply.arrays[name].copy())})


def with_nan(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[3] = np.nan
    return array


def negative_variance(reply: Reply) -> Reply:
    name = next(name for name in reply.arrays if name.endswith("running_var"))
    return replace(reply, arrays={**reply.arrays, name: -reply.arrays[name]})


BAD: dict[str, Callable[[Reply], Reply]] = {
    "nan": lambda reply: spoil(reply, with_nan),
    "shape": lambda reply: spoil(reply, lambda array: array[:1]),
    "dtype": lambda reply: spoil(reply, lambda array: array.astype(np.float64)),
    "variance": negative_variance,
    "missing": lambda reply: replace(reply, arrays=dict(list(reply.arrays.items())[1:])),
    "too many examples": lambda reply: replace(reply, num_examples=10**12),
    "negative examples": lambda reply: replace(reply, num_examples=-9),
    "no number": lambda reply: replace(reply, num_examples=float("nan")),  # type: ignore[arg-type]
    "garbage": lambda reply: replace(reply, arrays=dict.fromkeys(reply.arrays, b"garbage")),  # type: ignore[arg-type]
}


def first_client_of(change: Callable[[Reply], Reply]) -> Trainer:
    """A trainer in which client 0 replies something else."""
    return lambda task: change(train_client(task)) if task.client == 0 else train_client(task)


def test_a_bad_reply_is_dropped_as_if_the_client_had_been_silent(tmp_path: Path) -> None:
    asked = experiment(rounds=2, clients_per_round=6)

    def silent(task: Task) -> Reply:
        if task.client == 0:
            raise InputError("no reply")
        return train_client(task)

    simulate(asked, tmp_path / "silent", PROVENANCE, trainer=silent)
    for name, change in BAD.items():
        output = tmp_path / name.replace(" ", "-")
        (run,) = simulate(asked, output, PROVENANCE, trainer=first_client_of(change))
        assert all(list(row["dropped"]) == ["0"] for row in run.rows), name
        assert finals(output) == finals(tmp_path / "silent"), name


def test_without_a_quorum_the_global_checkpoint_stays(tmp_path: Path) -> None:
    asked = experiment(rounds=1, clients_per_round=6, quorum=6)
    (run,) = simulate(asked, tmp_path / "out", PROVENANCE, trainer=first_client_of(BAD["nan"]))
    assert run.rows[0]["loss"] is None
    (after,) = (tmp_path / "out").rglob("global-*.safetensors")
    assert content_digest(after) == content_digest(tmp_path / "out" / "start-seed0.safetensors")


def test_submodels_fit_their_devices_and_uploads_are_counted(tmp_path: Path) -> None:
    asked = experiment(methods=list(METHODS), rounds=1, clients_per_round=6, train={"steps": 1})
    sizes: dict[int, list[int]] = {}

    def watched(task: Task) -> Reply:
        reply = train_client(task)
        sizes.setdefault(task.client, []).append(sum(array.size for array in reply.arrays.values()))
        return reply

    runs = {run.method: run for run in simulate(asked, tmp_path / "out", PROVENANCE, trainer=watched)}
    full = max(sizes[0])
    names = [name for name in METHODS if name != "fedavg-strong"]  # which client 2 and 4 take no part in
    for client, limit in ((2, 0.5), (4, 0.25)):
        for name, size in zip(names, sizes[client], strict=True):
            assert name == "fedavg" or size <= limit * full, name
    uploads = {name: run.rows[0]["uploaded_bytes"] for name, run in runs.items()}
    flops = {name: run.rows[0]["client_flops"] for name, run in runs.items()}
    assert uploads["fedavg-smallest"] < uploads["heterofl"] < uploads["fedavg"]
    assert flops["fedavg-smallest"] < flops["heterofl"] < flops["fedavg"]
