"""Predicted peak memory against what ONNX Runtime's arena holds, on 20 networks with random widths.

Predicted: the activations of the cost model for a profile of this machine's channel block, one thread, at batch 1.
Measured: the exported file in ONNX Runtime on the CPU, three calls in a process of its own. Its profiler reports after
each kernel what the arena has in use; the figure is the highest over all calls minus what was in use before the first
kernel, which is weights. Inputs are not in the arena. Session options are the defaults but for the profiler, one
thread, and an arena that does not hand out chunks larger than asked for: the default arena grows in powers of two and
rounds a request up to a whole chunk, up to twice its size, depending on what came before. `default` is its figure, to
compare. The runtime orders some copies differently from session to session, so the median of three sessions counts and
`spread` is the largest over the smallest.

Networks are this package's, and small ones of other kinds, pruned through the library: a random share of 30-100% of
each family, in multiples of the number behind the x; "full" is not pruned. `seen` marks those that the model was
designed on.

    python scripts/bench_memory.py [--quick]

`total` is the error of `memory_bytes`, weights included, against the weights that kernels and arena hold, input and
arena. The last line is JSON: the figures, the bar beside the largest error, and `holds`. Needs transformers for ViT.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

BAR = 0.10
SESSIONS = 3
CALLS = 3
IMAGE = (3, 32, 32)
NETWORKS = {
    # name: (builder, seed or None for all channels, multiple, seen while the model was designed)
    "resnet20 a": ("resnet20", 3, 1, True),
    "vgg11 a": ("vgg11", 3, 1, True),
    "vgg11 b x4": ("vgg11", 2, 4, True),
    "mobilenet a": ("mobilenet", 3, 1, True),
    "densenet a": ("densenet", 3, 1, True),
    "densenet b x4": ("densenet", 2, 4, True),
    "vit a": ("vit", 2, 4, True),
    "resnet18 full": ("resnet18", None, 1, False),
    "resnet18 a": ("resnet18", 11, 1, True),
    "resnet18 b x8": ("resnet18", 12, 8, False),
    "resnet18 c": ("resnet18", 21, 1, False),
    "resnet56 a": ("resnet56", 11, 1, False),
    "resnet56 b x4": ("resnet56", 12, 4, True),
    "vgg16 full": ("vgg16", None, 1, False),
    "vgg16 a": ("vgg16", 11, 1, False),
    "vgg16 b x4": ("vgg16", 12, 4, False),
    "mobilenet wide": ("mobilenet_wide", 11, 4, False),
    "densenet wide": ("densenet_wide", 11, 8, True),
    "densenet wide b": ("densenet_wide", 22, 1, False),
    "vit wide": ("vit_wide", 11, 1, False),
}
QUICK = ["resnet20 a", "resnet18 c", "vgg16 a", "mobilenet wide", "densenet wide b", "vit wide"]


def build(name: str) -> tuple[Any, tuple[int, ...]]:
    """A network with random weights and the shape of one sample."""
    from networks import densenet, mobilenet, vit

    from cahfp_cli.models import resnet, vgg

    small = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 2, 2), (6, 64, 2, 2)]
    builders: dict[str, Callable[[], tuple[Any, tuple[int, ...]]]] = {
        "mobilenet": lambda: (mobilenet(32, small), IMAGE),
        "mobilenet_wide": lambda: (mobilenet(48, [(1, 24, 1, 2), (6, 40, 3, 2), (6, 96, 3, 2)]), (3, 64, 64)),
        "densenet": lambda: (densenet(12, (4, 4, 4)), IMAGE),
        "densenet_wide": lambda: (densenet(32, (3, 6, 4)), IMAGE),
        "vit": lambda: (vit(64, 2, 4, 64, 8, 128), (3, 64, 64)),
        "vit_wide": lambda: (vit(192, 4, 6, 96, 8, 384), (3, 96, 96)),
    }
    if name in builders:
        return builders[name]()
    package = resnet if name.startswith("resnet") else vgg
    return getattr(package, name)(IMAGE, 10), IMAGE


def channel_block() -> int:
    """Channels in a block of ONNX Runtime's convolutions: the fp32 lanes of a vector register."""
    flags = Path("/proc/cpuinfo").read_text()
    return 16 if "avx512f" in flags else 8


def one(name: str, folder: Path) -> dict[str, Any]:
    """Prune, predict, export; the file is left in the folder."""
    import numpy as np
    import torch

    from cahfp_cli.coupling.analysis import analyse, cut
    from cahfp_cli.device.catalogue import load_profile
    from cahfp_cli.device.cost import compile_workload
    from cahfp_cli.device.workload import make_workload
    from cahfp_cli.export.onnx_file import export_onnx

    builder, seed, multiple, _ = NETWORKS[name]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, shape = build(builder)
    model.eval()
    analysis = analyse(model, shape)
    groups, random = analysis.groups, np.random.default_rng(seed)
    kept = np.ones(groups.count, dtype=bool)
    for family in range(len(groups.names) if seed is not None else 0):
        members = random.permutation(np.flatnonzero(groups.family == family))
        width = int(len(members) * random.uniform(0.3, 1.0)) // multiple * multiple
        kept[members[max(width, min(multiple, len(members)), groups.narrowest[family]) :]] = False
    export_onnx(cut(model, analysis, kept)[0], shape, folder / "net.onnx", {})
    profile = load_profile("n100")  # any with blocked convolutions; the block is this machine's
    alignment = profile.alignment
    assert alignment is not None
    step = alignment.step.model_copy(update={"value": channel_block()})
    profile = profile.model_copy(
        update={
            "alignment": alignment.model_copy(update={"step": step}),
            "runtime": profile.runtime.model_copy(update={"threads": 1}),
        }
    )
    workload = make_workload(analysis, {n: t.element_size() for n, t in model.state_dict().items()})
    cost = compile_workload(workload, profile).cost(groups.widths(kept))
    return {
        "input": 4 * math.prod(shape),
        "predicted": float(cost.activation_bytes) - 4 * math.prod(shape),
        "memory": float(cost.memory_bytes),
    }


def measure(folder: Path, exact: bool) -> dict[str, Any]:
    """Arena bytes of the folder's network: `peak` above the weights that it holds, and `weights`, copies included."""
    import numpy as np
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_c

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    if exact:
        place = ort_c.OrtMemoryInfo("Cpu", ort_c.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort_c.OrtMemType.DEFAULT)
        ort_c.create_and_register_allocator(place, ort_c.OrtArenaCfg({"max_dead_bytes_per_chunk": 256}))
        options.add_session_config_entry("session.use_env_allocators", "1")
    session = ort.InferenceSession(str(folder / "net.onnx"), options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    sample = np.zeros((1, *given.shape[1:]), np.float32)
    for _ in range(CALLS):
        session.run(None, {given.name: sample})
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [event["args"] for event in events if event.get("name", "").endswith("_kernel_time")]
    before = int(kernels[0]["mem_bytes_in_use"]) - int(kernels[0]["mem_in_use_delta"])
    weights = sum(int(kernel.get("parameter_size", 0)) for kernel in kernels) // CALLS
    return {"peak": int(kernels[-1]["mem_in_use_peak"]) - before, "weights": weights + before}


def child(*arguments: str) -> dict[str, Any]:
    """This script in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="six networks")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one[0], Path(options.one[1]))))
        return
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1] == "exact")))
        return
    print("| network | seen | predicted, KB | measured, KB | error | spread | default, KB | total |")
    print("|---|---|---|---|---|---|---|---|")
    errors: dict[str, float] = {}
    totals: dict[str, float] = {}
    for name in QUICK if options.quick else NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            predicted = child("--one", name, folder)
            runs = [child("--measure", folder, "exact") for _ in range(SESSIONS)]
            default = child("--measure", folder, "default")
        peaks = [run["peak"] for run in runs]
        measured = statistics.median(peaks)
        errors[name] = predicted["predicted"] / measured - 1
        totals[name] = predicted["memory"] / (runs[0]["weights"] + measured + predicted["input"]) - 1
        print(
            f"| {name} | {'yes' if NETWORKS[name][3] else ''} | {predicted['predicted'] / 1e3:.1f} "
            f"| {measured / 1e3:.1f} | {errors[name]:+.1%} | {max(peaks) / min(peaks):.2f} "
            f"| {default['peak'] / 1e3:.1f} | {totals[name]:+.1%} |",
            flush=True,
        )
    absolute = {name: abs(error) for name, error in errors.items()}
    worst = max(absolute.values())
    print(
        json.dumps(
            {
                "networks": len(absolute),
                "max_error": {"value": round(worst, 4), "bar": BAR},
                "max_error_unseen": round(max(e for name, e in absolute.items() if not NETWORKS[name][3]), 4),
                "median_error": round(statistics.median(absolute.values()), 4),
                "within_bar": sum(error <= BAR for error in absolute.values()),
                "max_error_with_weights": round(max(map(abs, totals.values())), 4),
                "holds": worst <= BAR,
            }
        )
    )


if __name__ == "__main__":
    main()
