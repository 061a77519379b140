"""Coupling against Torch-Pruning: CPU seconds from a model to its pruned copy, side by side in one run.

Ours: trace in both modes, solve, prove, slice, and check the slice in both modes (`analyse` and `cut`). Theirs: the
dependency graph and one global pruning step by magnitude, its default (`MetaPruner`), which checks nothing. Both
remove 45% of the channels on one thread, each model and tool in a process of its own, in turn, with a limit of 120
seconds (45 in a quick run), which a run that is stopped counts with. CPU time of the process, so that other work on the
machine counts less; garbage of the imports is collected before. Torch-Pruning cannot prune ViT by itself: it gets the
settings that its authors' examples give by hand. Needs torchvision and torch-pruning.

    python scripts/bench_coupling.py [--quick] [--repeats N]

The last line is JSON: each figure, the bar beside it, and `holds`.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from typing import Any

MODELS = ["resnet18", "resnet50", "densenet121", "vgg16_bn", "mobilenet_v3_large", "vit_b_16", "swin_t"]
MODELS += ["convnext_tiny", "efficientnet_b0"]
QUICK = ["resnet18", "densenet121", "vgg16_bn", "mobilenet_v3_large", "vit_b_16", "swin_t", "convnext_tiny"]
LIMIT, QUICK_LIMIT = 120.0, 45.0
REMOVED = 0.45
LARGE = "vit_b_16"  # 86.6 million parameters; for the bar on 100 million


def ours(name: str) -> dict[str, float]:
    """CPU seconds of the whole path, and of trace and solve alone."""
    import numpy as np
    import torch
    import torchvision

    from cahfp_cli.coupling.adapters import adapt
    from cahfp_cli.coupling.analysis import analyse, cut

    torch.set_num_threads(1)
    model = adapt(torchvision.models.get_model(name, weights=None).eval())
    gc.collect()
    started = time.process_time()
    analysis = analyse(model, (3, 224, 224))
    analysed = time.process_time()
    groups = analysis.groups
    random = np.random.default_rng(0)
    kept = np.ones(groups.count, dtype=bool)
    for family in range(len(groups.names)):
        members = np.flatnonzero(groups.family == family)
        removed = min(round(REMOVED * len(members)), len(members) - groups.narrowest[family])
        kept[random.choice(members, removed, replace=False)] = False
    pruned, _ = cut(model, analysis, kept)
    done = time.process_time()
    with torch.no_grad():
        pruned(torch.rand(2, 3, 224, 224))
    return {
        "seconds": done - started,
        "analyse": analysed - started,
        "parameters": sum(p.numel() for p in model.parameters()),
        "kept": sum(p.numel() for p in pruned.parameters()),
    }


def theirs(name: str) -> dict[str, float]:
    """CPU seconds of graph and pruning step."""
    import torch
    import torch_pruning
    import torchvision

    torch.set_num_threads(1)
    model = torchvision.models.get_model(name, weights=None).eval()
    sample = torch.rand(1, 3, 224, 224)
    heads = [module for module in model.modules() if getattr(module, "out_features", None) == 1000]
    by_hand: dict[str, Any] = {}
    if name.startswith("vit"):
        by_hand = {
            "round_to": model.encoder.layers[0].num_heads,
            "unwrapped_parameters": [(model.encoder.pos_embedding, 2), (model.class_token, 2)],
        }
    gc.collect()
    started = time.process_time()
    pruner = torch_pruning.pruner.MetaPruner(
        model,
        sample,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=REMOVED,
        ignored_layers=heads,
        **by_hand,
    )
    pruner.step()
    if by_hand:
        model.hidden_dim = model.conv_proj.out_channels
    done = time.process_time()
    with torch.no_grad():
        model(torch.rand(2, 3, 224, 224))
    return {"seconds": done - started, "kept": sum(p.numel() for p in model.parameters())}


def measure(tool: str, name: str, limit: float) -> dict[str, Any]:
    """One run in a process of its own; `error` says how it failed."""
    command = [sys.executable, __file__, "--one", tool, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit + 30, check=False)
    except subprocess.TimeoutExpired:
        return {"seconds": limit, "error": f"stopped after {limit:.0f} s"}
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return result
    return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:80]}


def median(results: list[dict[str, Any]], field: str) -> float | None:
    values = [result[field] for result in results if field in result]
    return statistics.median(values) if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seven models, one run each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        tool, name = options.one
        print(json.dumps(ours(name) if tool == "ours" else theirs(name)))
        return
    models, repeats, limit = (QUICK, 1, QUICK_LIMIT) if options.quick else (MODELS, options.repeats, LIMIT)
    print("| model | ours, s | of it analyse | Torch-Pruning, s | theirs / ours | note |\n|---|---|---|---|---|---|")
    own: dict[str, float] = {}
    other: dict[str, float | None] = {}
    analysis: dict[str, float] = {}
    for name in models:
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
        for _ in range(repeats):
            for tool, results in runs.items():
                if not results or "error" not in results[-1]:  # what failed once fails again, and may take minutes
                    results.append(measure(tool, name, limit))
        if "error" in runs["ours"][0]:
            raise SystemExit(f"{name}: {runs['ours'][0]['error']}")
        own[name] = median(runs["ours"], "seconds") or 0.0
        analysis[name] = median(runs["ours"], "analyse") or 0.0
        other[name] = median(runs["theirs"], "seconds")
        shown = f"{other[name]:.2f} | {other[name] / own[name]:.2f}" if other[name] else "- | -"
        note = runs["theirs"][-1].get("error", "")
        print(f"| {name} | {own[name]:.2f} | {analysis[name]:.2f} | {shown} | {note} |", flush=True)
    compared = {name: seconds for name, seconds in other.items() if seconds is not None}
    failed = [name for name in models if name not in compared]
    faster = sum(own[name] < seconds for name, seconds in compared.items()) + len(failed)
    slowest = max((own[name] for name, seconds in compared.items() if own[name] >= seconds), default=0.0)
    ratio = sum(compared.values()) / sum(own[name] for name in compared)
    needed = 6 if len(models) == len(MODELS) else (2 * len(models) + 2) // 3
    figures = {
        "sum_ratio": (ratio, 3.0, ratio >= 3.0),
        "faster_on": (faster, needed, faster >= needed),
        "slowest_where_slower": (slowest, 2.0, slowest <= 2.0),
        "analyse_of_86_6_million_parameters": (analysis[LARGE], 2.0, analysis[LARGE] <= 2.0),
    }
    print(
        json.dumps(
            {
                **{name: {"value": round(value, 3), "bar": bar} for name, (value, bar, _) in figures.items()},
                "torch_pruning_failed_on": failed,
                "holds": all(held for _, _, held in figures.values()),
            }
        )
    )


if __name__ == "__main__":
    main()
