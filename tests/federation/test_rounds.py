"""Rounds on one harness: fair, safe against bad replies, and the same when taken up again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cahfp_cli.checkpoint.digest import content_digest, file_sha256
from cahfp_cli.checkpoint.metadata import CheckpointMetadata, SubmodelMetadata, dump_metadata, read_metadata
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.data.spec import load_data
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.federation import assessment
from cahfp_cli.federation.assessment import accuracy_on
from cahfp_cli.federation.client import Reply, Task, Trainer, train_client
from cahfp_cli.federation.methods import METHODS
from cahfp_cli.federation.setting import Setting
from cahfp_cli.federation.simulation import Run, check_merged, simulate, summary
from cahfp_cli.formats.files import INDEX_MAP, TENSORS
from cahfp_cli.formats.index_map import IndexMap
from cahfp_cli.formats.index_map_file import write_index_map
from cahfp_cli.reconstruction import gate as reconstruction_gate
from cahfp_cli.reconstruction.merge import reconstruct
from tests.support.experiments import PROVENANCE, experiment

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


COUNTING = """
import torch
from torch import nn


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)
        self.register_buffer("steps", torch.zeros((), dtype=torch.uint8))
        self.register_buffer("table", torch.arange(8))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def forward(self, x):
        if self.training:
            self.steps += 1
            self.begun |= True
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
"""


def test_a_network_that_counts_its_steps_is_trained_and_the_count_goes_on(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(COUNTING)
    asked = experiment(model={"spec": f"{tmp_path / 'net.py'}:Counting"}, methods=["heterofl"], rounds=2)
    (run,) = simulate(asked, tmp_path / "out", PROVENANCE)
    assert not any(row["dropped"] or row["failed"] for row in run.rows)
    (final,) = (tmp_path / "out").rglob("final.safetensors")
    with open_safetensors(final) as file:
        assert file.read("steps") >= 2 and file.read("begun") and file.read("table").tolist() == list(range(8))


def test_without_a_quorum_the_global_checkpoint_stays(tmp_path: Path) -> None:
    asked = experiment(methods=["heterofl"], rounds=1, clients_per_round=6, quorum=6)
    (run,) = simulate(asked, tmp_path / "out", PROVENANCE, trainer=first_client_of(BAD["nan"]))
    assert run.rows[0]["loss"] is None and run.rows[0]["failed"] == "5 sound replies, and the quorum is 6"
    (after,) = (tmp_path / "out").rglob("global-*.safetensors")
    assert content_digest(after) == content_digest(tmp_path / "out" / "start-seed0.safetensors")


def replace_all(reply: Reply, names: Callable[[str], bool], value: float) -> Reply:
    changed = {n: np.full_like(a, value) if names(n) else a for n, a in reply.arrays.items()}
    return replace(reply, arrays=changed)


def test_a_round_whose_merged_numbers_overflow_fails_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sound numbers only variances about distant means can overflow, which the gate does not let in; so the gate is
    told here that they are fine."""
    monkeypatch.setattr(reconstruction_gate, "check_statistics", lambda *arguments: None)
    bad = {(0, client): 1e20 * (-1) ** client for client in range(6)}

    def distant(task: Task) -> Reply:
        reply = train_client(task)
        value = bad.get((task.number, task.client))
        return reply if value is None else replace_all(reply, lambda name: name.endswith("running_mean"), value)

    asked = experiment(rounds=2, clients_per_round=6, methods=["heterofl"])
    (run,) = simulate(asked, tmp_path / "out", PROVENANCE, trainer=distant)
    first, second = run.rows
    assert first["loss"] is None and "too large for F32" in first["failed"] and not first["dropped"]
    assert second["loss"] is not None and second["failed"] is None
    nobody = experiment(rounds=1, clients_per_round=6, methods=["heterofl"], quorum=6)
    simulate(nobody, tmp_path / "failed", PROVENANCE, trainer=distant)
    (after,) = (tmp_path / "failed").rglob("global-*.safetensors")
    assert content_digest(after) == content_digest(tmp_path / "failed" / "start-seed0.safetensors")


def test_finite_weights_that_are_too_large_to_compute_with_fail_their_round_only(tmp_path: Path) -> None:
    def huge(task: Task) -> Reply:
        reply = train_client(task)
        if (task.number, task.client) != (0, 3):
            return reply
        return replace_all(reply, lambda name: not name.endswith(("tracked", "running_var", "running_mean")), 1e37)

    asked = experiment(rounds=2, clients_per_round=6, methods=["heterofl"], evaluation={"every": 1})
    (run,) = simulate(asked, tmp_path / "out", PROVENANCE, trainer=huge)
    first, second = run.rows
    assert "outputs are not finite" in first["failed"] and not first["dropped"]
    assert second["failed"] is None and second["accuracy"]["deployed"] > 0.05


def test_what_cannot_be_measured_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cahfp_cli.federation.rounds.computes", lambda *arguments: True)  # let it in
    huge: Callable[[Reply], Reply] = lambda reply: replace_all(reply, lambda n: n.endswith("weight"), 1e37)  # noqa: E731
    asked = experiment(
        rounds=2, clients_per_round=6, methods=["heterofl"], evaluation={"every": 1, "bound_terms": True}
    )
    (run,) = simulate(asked, tmp_path / "out", PROVENANCE, trainer=first_client_of(huge))
    for row in run.rows:
        found = row["accuracy"]
        assert set(found["missing"]) == {"plain", "recalibrated", "deployed", "own", "tuned"}
        assert {found[name] for name in ("loss", *found["missing"])} == {None} == set(found["by_device"])
        assert None in row["bound"].values() and row["bound_missing"]


def test_each_figure_stands_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One device whose tuning diverges takes nothing from other figures, and is not left out of a mean in silence."""
    asked = experiment(methods=["heterofl"], rounds=1)
    (whole,) = simulate(asked, tmp_path / "whole", PROVENANCE)
    tuned_copy = assessment.tuned_copy

    def diverging(setting: Setting, submodel: nn.Module, data: Dataset, number: int, client: int) -> nn.Module:
        if client == 3:
            raise InputError("training diverged")
        return tuned_copy(setting, submodel, data, number, client)

    monkeypatch.setattr(assessment, "tuned_copy", diverging)
    (run,) = simulate(asked, tmp_path / "out", PROVENANCE)
    expected = {**whole.rows[-1]["accuracy"], "tuned": None, "missing": {"tuned": "client 3: training diverged"}}
    assert run.rows[-1]["accuracy"] == expected and whole.rows[-1]["accuracy"]["tuned"] > 0
    (entry,) = json.loads((tmp_path / "out" / "summary.json").read_text())["results"]
    assert entry["tuned"] is None and entry["missing"] == {"tuned": "seed 0: client 3: training diverged"}
    assert entry["own"]["mean"] == expected["own"] and None not in entry["by_device"]


def test_a_run_of_which_no_round_was_merged_has_no_figures(tmp_path: Path) -> None:
    def silent(task: Task) -> Reply:
        if task.number == 0 or task.client == 1:
            raise InputError("no reply")
        return train_client(task)

    asked = experiment(methods=["heterofl"], rounds=2, clients_per_round=6, evaluation={"every": 1})
    (run,) = simulate(asked, tmp_path / "out", PROVENANCE, trainer=silent)
    first, second = (row["accuracy"] for row in run.rows)
    assert first["deployed"] is None and "client 0: no reply" in first["missing"]["tuned"]
    assert second["deployed"] > 0 and not second["missing"]
    check_merged([run])
    with pytest.raises(InputError, match="nothing was trained in any run: no round was merged; 0 sound replies"):
        check_merged([replace(run, rows=run.rows[:1])])
    check_merged([replace(run, rows=run.rows[:1]), run])


def test_a_mean_over_seeds_is_missing_where_that_of_one_is() -> None:
    accuracy = {**dict.fromkeys(("plain", "recalibrated", "deployed", "own", "tuned"), 0.5), "by_device": [0.5, 0.25]}
    row = {"uploaded_bytes": 0, "client_flops": 0.0, "seconds": 1.0, "dropped": {}, "failed": None}
    sound, other = (
        {**accuracy, "missing": {}},
        {**accuracy, "own": None, "by_device": [0.5, None], "missing": {"own": "x"}},
    )
    runs = [
        Run("iid", "heterofl", seed, ({**row, "accuracy": found},)) for seed, found in enumerate((sound, other, other))
    ]
    (entry,) = summary(experiment(methods=["heterofl"], partitions=["iid"]), runs)["results"]
    assert entry["own"] is None and entry["missing"] == {"own": "seed 1: x"}
    assert entry["deployed"] == {"mean": 0.5, "sd": 0.0} and entry["by_device"] == [0.5, None]


def test_test_data_that_lacks_a_class_is_no_fault(tmp_path: Path) -> None:
    digits = load_data("digits@test")
    known = digits.y < 9
    np.savez(tmp_path / "test.npz", x=digits.x[known], y=digits.y[known])
    data = {"train": "digits@train[0:400]", "test": f"npz:{tmp_path / 'test.npz'}"}
    (run,) = simulate(experiment(rounds=1, data=data), tmp_path / "out", PROVENANCE)
    assert not run.rows[0]["accuracy"]["missing"] and 0 <= run.rows[0]["accuracy"]["own"] <= 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": ["heterofl", "fedavg-strong"], "quorum": 3}, "2 devices of the fleet hold the whole network"),
        ({"partitions": ["iid", "classes(11)"]}, "only 10 classes"),
        ({"partitions": ["iid", "by-column(user)"]}, "only npz:FILE has columns"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        simulate(experiment(**changes), tmp_path / "out", PROVENANCE)
    assert not (tmp_path / "out").exists()


def test_statistics_that_could_not_be_pooled_and_changed_integers_drop_their_client(tmp_path: Path) -> None:
    distant: Callable[[Reply], Reply] = lambda reply: replace_all(reply, lambda n: n.endswith("running_mean"), 1e20)  # noqa: E731
    backward: Callable[[Reply], Reply] = lambda reply: replace_all(reply, lambda n: n.endswith("tracked"), -1)  # noqa: E731
    for name, change, says in (("distant", distant, "too large"), ("backward", backward, "counts no batches")):
        asked = experiment(rounds=1, clients_per_round=6)
        (run,) = simulate(asked, tmp_path / name, PROVENANCE, trainer=first_client_of(change))
        assert list(run.rows[0]["dropped"]) == ["0"] and says in run.rows[0]["dropped"]["0"]
        assert run.rows[0]["failed"] is None


def test_a_round_merges_to_what_reconstruct_makes_of_the_folders_of_its_replies(tmp_path: Path) -> None:
    """The second round of three sizes of device, with each reply written as a submodel folder."""
    replies: dict[int, tuple[Task, Reply]] = {}

    def kept(task: Task) -> Reply:
        replies[task.client] = task, train_client(task)
        return replies[task.client][1]

    asked = experiment(methods=["heterofl"], rounds=1, clients_per_round=6)
    simulate(asked, tmp_path / "out", PROVENANCE, trainer=kept)
    start = tmp_path / "out" / "start-seed0.safetensors"
    folders = []
    with open_safetensors(start) as file:
        about = read_metadata(file, CheckpointMetadata)
    assert about.model is not None and about.input_shape is not None and about.classes is not None
    for client, (task, reply) in replies.items():
        folder = tmp_path / f"client-{client}"
        folder.mkdir()
        metadata = SubmodelMetadata(
            model=about.model,
            input_shape=about.input_shape,
            classes=about.classes,
            checkpoint=task.index_map.checkpoint,
            num_examples=reply.num_examples,
            provenance=PROVENANCE,
        )
        save_arrays(folder / TENSORS, reply.arrays, dump_metadata(metadata))
        write_index_map(folder / INDEX_MAP, task.index_map, PROVENANCE)
        folders.append(folder)
    merged = tmp_path / "merged.safetensors"
    reconstruct(start, folders[::-1], merged, rule="fill", provenance=PROVENANCE)
    (after,) = (tmp_path / "out").rglob("global-*.safetensors")
    assert content_digest(after) == content_digest(merged)
    with open_safetensors(after) as file:
        recorded = {one.file: one.sha256 for one in read_metadata(file, CheckpointMetadata).provenance.inputs}
    assert recorded == {f"{folder.name}/{TENSORS}": file_sha256(folder / TENSORS) for folder in folders}


def test_coverage_counts_the_clients_that_hold_each_entry(tmp_path: Path) -> None:
    maps: dict[int, IndexMap] = {}

    def kept(task: Task) -> Reply:
        if task.client == 1:
            raise InputError("no reply")
        maps[task.client] = task.index_map
        return train_client(task)

    (run,) = simulate(
        experiment(methods=["random"], rounds=1, clients_per_round=6), tmp_path / "out", PROVENANCE, trainer=kept
    )
    found = run.rows[0]["coverage"]
    names = {name for name, entry in maps[0].tensors.items() if len(entry.shape) > 1}
    assert found.keys() == names and len(maps) == 5
    for name, counts in found.items():
        holders = np.zeros(maps[0].tensors[name].shape, int)
        for index_map in maps.values():
            entry = index_map.tensors[name]
            whole = [np.arange(n) if one is None else one for one, n in zip(entry.axes, entry.shape, strict=True)]
            holders[np.ix_(*whole)] += 1
        assert counts == np.bincount(holders.reshape(-1), minlength=6).tolist()
    assert sum(map(len, found.values())) == 6 * len(found) and max(map(max, found.values())) > 0


def test_the_learning_rate_falls_as_a_cosine_over_the_rounds(tmp_path: Path) -> None:
    rates: list[float] = []

    def trainer(task: Task) -> Reply:
        rates.append(task.options.lr)
        return train_client(task)

    for schedule in ("constant", "cosine"):
        rates.clear()
        asked = experiment(methods=["heterofl"], rounds=4, train={"lr": 0.08, "schedule": schedule})
        simulate(asked, tmp_path / schedule, PROVENANCE, trainer=trainer)
        a_round = asked.clients_per_round
        assert all(len(set(rates[first : first + a_round])) == 1 for first in range(0, 4 * a_round, a_round))
        half = 0.08 * (1 + 2**-0.5) / 2, 0.08 * (1 - 2**-0.5) / 2
        wanted = [0.08] * 4 if schedule == "constant" else [0.08, half[0], 0.04, half[1]]
        assert rates[::a_round] == pytest.approx(wanted)


def test_own_and_tuned_accuracy_count_classes_as_the_device_has_them(tmp_path: Path) -> None:
    assert accuracy_on(np.array([6, 2, 0]), np.array([5, 1, 0]), np.array([10, 4, 8])) == pytest.approx(
        (6 * 0.5 + 2 * 0.25) / 8
    )
    assert accuracy_on(np.array([6, 2, 2]), np.array([5, 0, 4]), np.array([10, 0, 8])) == pytest.approx(0.5)
    assert (
        accuracy_on(np.array([0, 2, 0]), np.array([5, 0, 4]), np.array([10, 0, 8]))
        == "the test data has no sample of its classes"
    )
    asked = experiment(methods=["heterofl"], rounds=2, partitions=["classes(2)"], evaluation={"tuning_lr": 0.05})
    (run,) = simulate(asked, tmp_path / "out", PROVENANCE)
    found = run.rows[-1]["accuracy"]
    assert found["tuned"] > found["own"] + 0.2  # with two classes each, a device soon knows its own


def test_the_rule_by_curvature_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'curvature' needs curvature of each client"):
        simulate(experiment(rule="curvature"), tmp_path / "out", PROVENANCE)
    assert not (tmp_path / "out").exists()


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
