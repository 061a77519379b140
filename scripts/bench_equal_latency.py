"""Accuracy right after pruning at equal measured latency: selection by predicted latency against selection by MACs.

Both select sets alike (`select_set`, compensated, the same samples); they differ only in the budget: a latency on this
machine's measured profile, or a share of the MACs, which is what is common. The share is corrected by what its network
measures, and of a few such networks the slowest counts that takes at most 3% longer than ours. Networks are those
of bench_significance.py (its cache is shared), latencies those of ONNX Runtime, one thread, thread CPU time.

    python scripts/bench_equal_latency.py [--seeds 3] [--budgets 0.7 0.45] [--quick]

The last line is JSON: each figure, the bar beside it (a lead above 0 at every budget), and `holds`.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from bench_latency import LINKS
from bench_significance import CPU, FULL, POOL, QUICK, SHAPE, Case, Choice, Store, images, network_of, percent

from cahfp_cli.coupling.analysis import cut
from cahfp_cli.device.cost import compile_workload
from cahfp_cli.device.measurement import measure_device
from cahfp_cli.device.profile import DeviceProfile
from cahfp_cli.device.quantities import Share
from cahfp_cli.export.onnx_file import export_onnx
from cahfp_cli.output import table
from cahfp_cli.pruning.budget import Budget
from cahfp_cli.pruning.selection import Selection
from cahfp_cli.pruning.set_selection import select_set
from cahfp_cli.running.evaluation import evaluate
from cahfp_cli.running.stopwatch import seconds_a_call

SHARES = (0.7, 0.45)
PROBES, MOST_PROBES = 4, 10
"""Networks by MACs that are tried, and more until one of them is fast enough."""
CLOSE = 0.03
"""Networks by MACs may be so much slower than ours."""


def measured(case: Case, kept: np.ndarray) -> float:
    """Seconds of a call."""
    compact, _ = cut(case.model, case.analysis, kept)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(compact, SHAPE, path, {})
        return seconds_a_call(path)


def accuracy(case: Case, selection: Selection) -> float:
    network = network_of(case, Choice(selection.kept, selection.gates))
    return evaluate(network, images("test"), 250, CPU).accuracy


def compare(case: Case, profile: DeviceProfile, share: float) -> tuple[float, float, float, float]:
    """Accuracy and measured seconds of ours, then of the network by MACs."""
    pool = case.calibration(POOL)
    timed = compile_workload(case.cost.workload, profile)
    limit = share * float(timed.full.latency_seconds)
    ours = select_set(case.model, case.analysis, timed, Budget(latency=limit), pool)
    seconds = measured(case, ours.kept)
    best: tuple[float, float] = (0.0, 0.0)
    share_of_macs = float(ours.cost.macs / ours.full.macs)
    for number in range(MOST_PROBES):
        if number >= PROBES and best[1]:
            break
        found = select_set(case.model, case.analysis, case.cost, Budget(macs=Share(share_of_macs)), pool)
        took = measured(case, found.kept)
        if best[1] < took <= (1 + CLOSE) * seconds:
            best = accuracy(case, found), took
        share_of_macs = float(np.clip(share_of_macs * min(seconds / took, 1.5), 0.01, 1.0))
    if not best[1]:
        raise SystemExit(f"no network by MACs is as fast as {seconds * 1e6:.0f} us")
    return accuracy(case, ours), seconds, *best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path(".cache-significance"))
    parser.add_argument("--budgets", type=float, nargs="+", default=SHARES, help="shares of the full latency")
    parser.add_argument("--only", choices=("vgg", "resnet"), nargs="+", default=("vgg", "resnet"))
    parser.add_argument("--quick", action="store_true", help="a small VGG, one seed, one budget")
    options = parser.parse_args()
    torch.set_num_threads(1)
    profile = measure_device("this-machine", 1, LINKS).profile
    store = Store(options.cache, False)
    recipes = [r for r in (QUICK if options.quick else FULL).recipes if r.architecture in options.only]
    rows, figures = [], {}
    for recipe in recipes:
        for share in options.budgets[:1] if options.quick else options.budgets:
            cases = [Case(recipe, seed, store) for seed in range(1 if options.quick else options.seeds)]
            found = np.array([compare(case, profile, share) for case in cases])
            lead = found[:, 0] - found[:, 2]
            rows.append(
                [
                    recipe.architecture,
                    f"{share:.0%}",
                    percent(found[:, 0].tolist()),
                    percent(found[:, 2].tolist()),
                    f"{100 * lead.mean():+.1f}",
                    f"{1e6 * found[:, 1].mean():.0f}",
                    f"{1e6 * found[:, 3].mean():.0f}",
                ]
            )
            print(rows[-1], flush=True)
            figures[f"{recipe.architecture}_lead_at_{share:.0%}"] = {
                "value": round(100 * float(lead.mean()), 2),
                "bar": "> 0",
                "holds": bool(lead.mean() > 0),
            }
    head = ("network", "of full latency", "ours, %", "by MACs, %", "lead", "ours, us", "by MACs, us")
    print(table(head, rows))
    print(json.dumps({"quick": options.quick, **figures, "holds": all(f["holds"] for f in figures.values())}))


if __name__ == "__main__":
    main()
