"""All runs of an experiment, and their figures together."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cahfp_cli.checkpoint.atomic import atomic_file
from cahfp_cli.checkpoint.metadata import Provenance
from cahfp_cli.checkpoint.sole_writer import sole_writer
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.federation.client import Trainer, train_client
from cahfp_cli.federation.clients import Clients, LocalClients
from cahfp_cli.federation.experiment import Experiment
from cahfp_cli.federation.methods import METHODS
from cahfp_cli.federation.run import Row, run, why_nothing
from cahfp_cli.federation.setting import Common, make_setting, prepare, write_start
from cahfp_cli.federation.workers import workers
from cahfp_cli.reconstruction.allocator import keep_freed_memory
from cahfp_cli.running.device import use_threads

EXPERIMENT, METRICS, SUMMARY = "experiment.json", "metrics.jsonl", "summary.json"
ACCURACIES = ("recalibrated", "plain", "deployed", "own", "tuned")


@dataclass(frozen=True)
class Run:
    """One method on one partition with one seed, and a row of figures for each of its rounds."""

    partition: str
    method: str
    seed: int
    rows: tuple[Row, ...]


def simulate(
    experiment: Experiment,
    output: Path,
    provenance: Provenance,
    *,
    resume: bool = False,
    trainer: Trainer = train_client,
    fleet: Clients | None = None,
    on_round: Callable[[str, str, int, Row], None] = lambda partition, method, seed, row: None,
) -> tuple[Run, ...]:
    """Run every method on every partition with every seed into the folder `output`, one after the other.

    Args:
        resume: go on with what `output` holds; else it must not exist.
        trainer: what each client of this process does. fleet: others than those of this process.
        on_round: called after each committed round with partition, method, seed and the round's figures.
    Raises: UsageError, InputError, BudgetError: see `setting.prepare`; InputError: `output` exists without `resume`, or
        holds another experiment.
    """
    if fleet is None:
        check_has_data(experiment)
    runs = []
    with begun(experiment, output, provenance, resume) as (common, _):
        for plan in plans(experiment):

            def committed(row: Row, plan: Plan = plan) -> None:
                on_round(plan.partition, plan.method, plan.seed, row)

            runs.append(plan.done(run_plan(common, plan, output, fleet or LocalClients(trainer), committed)))
        return finish(experiment, output, runs)


def simulate_in_parallel(
    experiment: Experiment,
    output: Path,
    provenance: Provenance,
    jobs: int,
    threads: int,
    *,
    resume: bool = False,
    on_round: Callable[[str, str, int, Row], None] = lambda partition, method, seed, row: None,
) -> tuple[Run, ...]:
    """As `simulate`, with `jobs` runs at a time in processes of their own, of so many threads each; the results are the
    same. `on_round` is called for all rounds of a run when it has ended.

    Raises: as `simulate`; whatever ends a run, once those that had begun have ended; InputError: a process was ended
        from outside.
    """
    check_has_data(experiment)
    rows: dict[Plan, tuple[Row, ...]] = {}
    with begun(experiment, output, provenance, resume) as (_, held):
        with workers(jobs, held) as pool:
            asked = {
                pool.submit(run_alone, experiment, one, output, provenance, threads): one for one in plans(experiment)
            }
            for done in as_completed(asked):
                plan = asked[done]
                rows[plan] = done.result()
                for row in rows[plan]:
                    on_round(plan.partition, plan.method, plan.seed, row)
        return finish(experiment, output, [plan.done(rows[plan]) for plan in plans(experiment)])


@dataclass(frozen=True)
class Plan:
    """A run that is to be done."""

    partition: str
    method: str
    seed: int

    def done(self, rows: Sequence[Row]) -> Run:
        return Run(self.partition, self.method, self.seed, tuple(rows))


def plans(experiment: Experiment) -> list[Plan]:
    """The runs of an experiment, in order."""
    return [
        Plan(partition, method, seed)
        for seed in experiment.seeds
        for partition in experiment.partitions
        for method in experiment.methods
    ]


@contextmanager
def begun(experiment: Experiment, output: Path, provenance: Provenance, resume: bool) -> Iterator[tuple[Common, int]]:
    """Make the folder, with the record of the experiment and the checkpoints that all methods start from. In the block
    nobody else writes into it; yields the descriptor of that lock, too."""
    check_output(output, experiment, resume)
    common = prepare(experiment, provenance)
    check_runs(common)
    try:
        output.mkdir(parents=True, exist_ok=resume)
    except FileExistsError:
        check_output(output, experiment, resume)  # it came into being meanwhile
        raise
    with sole_writer(output) as held:
        check_output(output, experiment, resume=True)
        write_text(output / EXPERIMENT, recorded(experiment))
        for seed in experiment.seeds:
            if not start_of(output, seed).exists():
                write_start(common, seed, start_of(output, seed))
        yield common, held


def start_of(output: Path, seed: int) -> Path:
    """The checkpoint that all methods start from with this seed."""
    return output / f"start-seed{seed}.safetensors"


def run_plan(common: Common, plan: Plan, output: Path, fleet: Clients, on_round: Callable[[Row], None]) -> list[Row]:
    """Do one run, or what is left of it."""
    setting = make_setting(common, plan.partition, plan.seed)
    folder = output / "runs" / folder_name(plan.partition) / plan.method / f"seed{plan.seed}"
    return run(setting, plan.method, start_of(output, plan.seed), folder, fleet, on_round)


def run_alone(
    experiment: Experiment, plan: Plan, output: Path, provenance: Provenance, threads: int
) -> tuple[Row, ...]:
    """One run in a process that was made for it."""
    use_threads(threads)
    keep_freed_memory()
    return tuple(run_plan(prepare(experiment, provenance), plan, output, LocalClients(), lambda row: None))


def finish(experiment: Experiment, output: Path, runs: Sequence[Run]) -> tuple[Run, ...]:
    """Write the figures of all runs."""
    write_text(output / METRICS, "".join(json.dumps(line) + "\n" for line in lines(runs)))
    write_text(output / SUMMARY, json.dumps(summary(experiment, runs), indent=2, allow_nan=False) + "\n")
    return tuple(runs)


def recorded(experiment: Experiment) -> str:
    """The experiment as the folder records it, defaults included."""
    return experiment.model_dump_json(indent=2) + "\n"


def check_has_data(experiment: Experiment) -> None:
    """Raises: UsageError: only clients on machines of their own have the training data, or know their devices."""
    if experiment.reported:
        raise UsageError("a fleet entry's profile is 'reported': only nodes of a federation over many machines report.")
    if experiment.on_device:
        raise UsageError(
            "partition on-device: the clients of a simulation have no data of their own.\n"
            "Run it over Flower on many machines, or use by-column(NAME) here."
        )


def check_runs(common: Common) -> None:
    """Raises: InputError: data that cannot be split as a partition says; a method for which too few devices are large
    enough."""
    experiment = common.experiment
    for partition in experiment.partitions:
        for seed in experiment.seeds:
            make_setting(common, partition, seed)
    full = sum(device.is_full for device in common.devices)
    for name in experiment.methods:
        if METHODS[name].strong_only and full < experiment.quorum:
            raise InputError(
                f"{name}: {full} devices of the fleet hold the whole network, and the quorum is {experiment.quorum}; "
                "leave this method out."
            )


def check_output(output: Path, experiment: Experiment, resume: bool) -> None:
    """Raises: InputError: the folder exists without `resume`, or holds anything but the same experiment."""
    record = output / EXPERIMENT
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: it is a file, not a folder; name another output.")
    if output.exists() and not resume:
        raise InputError(f"{output} exists: pass --resume to go on with it, or name another folder.")
    if record.exists() and record.read_text() != recorded(experiment):
        raise InputError(f"{output}: it holds another experiment; name another folder, or go back to its file.")
    if output.exists() and not record.exists() and any(output.iterdir()):
        raise InputError(f"{output}: it holds no {EXPERIMENT}, so it is not an output of cahfp simulate.")


def folder_name(partition: str) -> str:
    """`dirichlet(0.5)` as `dirichlet-0.5`."""
    return partition.replace("(", "-").rstrip(")")


def write_text(path: Path, text: str) -> None:
    with atomic_file(path, force=True) as temporary:
        temporary.write_text(text)


def lines(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Every round of every run."""
    for one in runs:
        for row in one.rows:
            yield {"partition": one.partition, "method": one.method, "seed": one.seed, **row}


def summary(experiment: Experiment, runs: Sequence[Run]) -> dict[str, Any]:
    """Of each method on each partition the figures after the last round: mean and standard deviation over seeds; None
    where that of one seed is missing, and in `missing` why, by the figure's name."""
    entries = []
    for partition in experiment.partitions:
        for method in experiment.methods:
            done = [one for one in runs if (one.partition, one.method) == (partition, method)]
            own = [one.rows for one in done]
            entry: dict[str, Any] = {"partition": partition, "method": method, "seeds": len(own)}
            last = {one.seed: one.rows[-1]["accuracy"] for one in done}
            for name in ACCURACIES:
                values = [found[name] for found in last.values()]
                entry[name] = None if None in values else spread(values)
            devices = zip(*(found["by_device"] for found in last.values()), strict=True)
            entry["by_device"] = [None if None in values else float(np.mean(values)) for values in devices]
            entry["missing"] = {
                name: f"seed {seed}: {found['missing'][name]}"
                for seed, found in reversed(last.items())  # so that the first seed's reason stays
                for name in found["missing"]
            }
            for name in ("uploaded_bytes", "client_flops"):
                entry[name] = float(np.mean([rows[-1][name] for rows in own]))
            entry["seconds"] = float(np.mean([sum(row["seconds"] for row in rows) for rows in own]))
            entry["dropped"] = sum(len(row["dropped"]) for rows in own for row in rows)
            entry["failed"] = sum(row["failed"] is not None for rows in own for row in rows)
            entries.append(entry)
    return {"experiment": experiment.model_dump(mode="json"), "results": entries}


def check_merged(runs: Sequence[Run]) -> None:
    """Raises: InputError: no round of any run was merged."""
    reasons = [why_nothing(one.rows) for one in runs]
    if reasons and all(reasons):
        raise InputError(f"nothing was trained in any run: {reasons[0]}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, and standard deviation of a sample (0 of a single one)."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}
