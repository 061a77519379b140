"""What a simulated round costs beside the clients' training, on the local backend: twenty clients of 1 MB each.

    python scripts/bench_round.py [--quick]

The clients do nothing: each replies with the tensors it was sent. What is left is choosing, cutting, the gate, merging
and committing the round. Three methods: `fedavg` on a network of 1 MB sends everybody the same; `heterofl` and `random`
cut submodels of 1 MB from a network of 2.2 MB, the one by few masks, the other by one of its own for each client.

How to read the output: seconds a round, wall and CPU time, the median over rounds (the first, which fills caches, and
the last, which is evaluated, do not count), beside the least. The bar is 0.3 s of wall time for each method. With
--quick 6 rounds count instead of 20. The last line is JSON: each figure, the bar beside it, and `holds`.
"""

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from cahfp_cli.federation.client import Reply, Task
from cahfp_cli.federation.experiment import Experiment
from cahfp_cli.federation.simulation import simulate
from cahfp_cli.provenance import provenance
from cahfp_cli.pruning.submodel import trained_arrays
from cahfp_cli.reconstruction.allocator import keep_freed_memory

BAR_SECONDS = 0.3
CLIENTS = 20
MEGABYTE = 1e6
METHODS = {"fedavg": (0.165, {"keep": 1.0}), "heterofl": (0.25, {"params": 0.45}), "random": (0.25, {"params": 0.45})}
"""Width of the network, and the share of it that a client has: submodels of about 1 MB."""


def experiment(method: str, rounds: int) -> Experiment:
    width, share = METHODS[method]
    return Experiment.model_validate(
        {
            "model": {"spec": "vgg11", "args": {"width": width}},
            "data": {"train": "digits@train", "test": "digits@test[0:20]"},
            "partitions": ["iid"],
            "fleet": [{"count": CLIENTS, **share}],
            "methods": [method],
            "rounds": rounds,
            "clients_per_round": CLIENTS,
            "evaluation": {"every": rounds, "samples": 2},
            "train": {"steps": 1},
        }
    )


def measure(method: str, counted: int) -> dict[str, float]:
    """Seconds of each counted round, and megabytes of a client."""
    walls, cpus, sizes = [], [], []

    def idle(task: Task) -> Reply:
        arrays = trained_arrays(task.model, task.index_map)
        sizes.append(sum(array.nbytes for array in arrays.values()) / MEGABYTE)
        return Reply(arrays, len(task.data), 1.0)

    def committed(*row: Any) -> None:
        walls.append(time.perf_counter())
        cpus.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        source = provenance("bench_round", {}, [])
        simulate(experiment(method, counted + 2), Path(folder, "out"), source, trainer=idle, on_round=committed)
    wall, cpu = ([b - a for a, b in pairwise(times[:-1])] for times in (walls, cpus))
    return {
        "megabytes": statistics.mean(sizes),
        "wall": statistics.median(wall),
        "least": min(wall),
        "cpu": statistics.median(cpu),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the command does
    figures: dict[str, Any] = {}
    print(f"{'method':<10} {'a client':>9} {'wall':>8} {'least':>8} {'CPU':>8}   seconds a round, {CLIENTS} clients")
    for method in METHODS:
        found = measure(method, 6 if options.quick else 20)
        print(
            f"{method:<10} {found['megabytes']:>6.2f} MB {found['wall']:>8.3f} {found['least']:>8.3f} "
            f"{found['cpu']:>8.3f}",
            flush=True,
        )
        holds = found["wall"] < BAR_SECONDS
        figures[method] = {name: round(value, 4) for name, value in found.items()} | {
            "bar": BAR_SECONDS,
            "holds": holds,
        }
    holds = all(entry["holds"] for entry in figures.values())
    print(json.dumps({"quick": options.quick, **figures, "holds": holds}))


if __name__ == "__main__":
    main()
