"""What each method of `cahfp simulate` reaches on Fashion-MNIST: twenty clients, four unlike sizes of device.

    python scripts/bench_federation.py [--experiment scripts/federation.toml] [-o FOLDER] [--resume] [--quick]

How to read the output: one table a partition, one row a method, mean and standard deviation over seeds after the last
round. `global` is the global network with renewed statistics of norms, `deployed` the mean over devices of the
submodels cut for them, `own` the same on classes as each device has them, `tuned` that after one local epoch. Bars:
CA-HFP's deployed accuracy above that of every other method by more than both spreads; its global one above HeteroFL's
and FedRolex's likewise, and at dirichlet(0.5) within 2 points of FedAvg's with less than half of its bytes. With
--quick (fewer images, rounds, methods, one partition, one seed: under 6 minutes on two cores) spreads are 0. The last
line is JSON: each figure, the bar beside it, and `holds`, which is null where nothing has a bar.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cahfp_cli.commands.live import percent
from cahfp_cli.commands.simulate import COLUMNS, rows_of
from cahfp_cli.federation.experiment import Experiment, read_experiment
from cahfp_cli.federation.simulation import simulate_in_parallel, summary
from cahfp_cli.output import table
from cahfp_cli.provenance import provenance

OURS = "cahfp"
PEERS = (
    "fedavg", "fedavg-smallest", "fedavg-strong", "heterofl", "heterofl-unscaled", "fedrolex", "fjord", "random",
    "magnitude", "taylor",
)  # fmt: skip
"""What has bars; variants of one of them, or of CA-HFP, show what a part brings."""
QUICK = {
    "partitions": ("dirichlet(0.5)",),
    "methods": ("fedavg", "fedavg-smallest", "heterofl", "fedrolex", "magnitude", "cahfp"),
    "seeds": (0,),
    "rounds": 12,
    "data": {"train": "fashion-mnist@train[0:4000]", "test": "fashion-mnist@test[0:1000]"},
    "evaluation": {"every": 6},
}
Figures = dict[str, dict[str, Any]]


def quick(experiment: Experiment) -> Experiment:
    return Experiment.model_validate({**experiment.model_dump(), **QUICK})


def figure(value: float, bar: str, holds: bool) -> dict[str, Any]:
    return {"value": None if math.isnan(value) else round(value, 4), "bar": bar, "holds": bool(holds)}


def figures_of(results: list[dict[str, Any]], partition: str) -> Figures:
    """The bars on one partition, in points."""
    own = {entry["method"]: entry for entry in results if entry["partition"] == partition}
    if OURS not in own:
        return {}
    ours, found = own[OURS], {}

    def of(entry: dict[str, Any], kind: str, part: str) -> float:
        """NaN where it is missing: no bar holds then."""
        return math.nan if entry[kind] is None else 100 * float(entry[kind][part])

    def lead(kind: str, other: str) -> dict[str, Any]:
        theirs = own[other]
        points = of(ours, kind, "mean") - of(theirs, kind, "mean")
        spread = of(ours, kind, "sd") + of(theirs, kind, "sd")
        return figure(points, f"> {spread:.2f}", points > spread)

    for other in own:
        if other in PEERS:
            found[f"{partition}: deployed, lead over {other}"] = lead("deployed", other)
    for other in ("heterofl", "fedrolex"):
        if other in own:
            found[f"{partition}: global, lead over {other}"] = lead("recalibrated", other)
    if partition == "dirichlet(0.5)" and "fedavg" in own:
        behind = of(own["fedavg"], "recalibrated", "mean") - of(ours, "recalibrated", "mean")
        found[f"{partition}: global, behind fedavg"] = figure(behind, "<= 2", behind <= 2)
        share = ours["uploaded_bytes"] / own["fedavg"]["uploaded_bytes"]
        found[f"{partition}: uploaded, share of fedavg"] = figure(share, "< 0.5", share < 0.5)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=Path, default=Path(__file__).with_name("federation.toml"))
    parser.add_argument("-o", "--output", type=Path, help="keep the runs here; else nothing is kept")
    parser.add_argument("--resume", action="store_true", help="go on with what --output holds")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, in processes of their own")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    asked = read_experiment(options.experiment)
    if options.quick:
        asked = quick(asked)
    started = time.monotonic()

    def on_round(partition: str, method: str, seed: int, row: dict[str, Any]) -> None:
        if "accuracy" in row:
            found = row["accuracy"]
            shown = f"global {percent(found['recalibrated'])}%, deployed {percent(found['deployed'])}%"
            print(f"{partition}, {method}, seed {seed}, round {row['round']}: {shown}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        output = options.output or Path(temporary, "runs")
        origin = provenance("bench_federation", {}, [options.experiment])
        runs = simulate_in_parallel(
            asked, output, origin, options.jobs, options.threads, resume=options.resume, on_round=on_round
        )
    found = summary(asked, runs)
    figures: Figures = {}
    for partition in asked.partitions:
        print(f"\n{partition}\n{table(COLUMNS, rows_of(found, partition))}", flush=True)
        figures |= figures_of(found["results"], partition)
    seconds = round(time.monotonic() - started, 1)
    holds = all(entry["holds"] for entry in figures.values()) if figures else None
    print(json.dumps({"quick": options.quick, "seconds": seconds, **figures, "holds": holds}))


if __name__ == "__main__":
    main()
