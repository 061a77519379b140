"""Quantised ONNX files against the fp32 file they are made from: CPU time a call, accuracy, size, side by side.

Trains our resnet18 on Fashion-MNIST at 28x28, exports it, and makes fp16 and int8 files as `cahfp prune --dtype` does,
calibrated on 1,024 training images in 16 batches. Then all files are called in turn, one image at a time on one thread
of ONNX Runtime, and the process time of each call is noted: work of others on the machine counts little, and what there
is of it meets all files alike. `ratio` is fp32's median over the file's. Accuracy is that of test images.

`int8` has the layout of this CPU; `int8, signed` is what a profile without `architecture = "x86"` gets, to show what
the layout is worth here. ONNX Runtime computes fp16 in float32 on most CPUs, so that fp16 wins size only.

    python scripts/bench_quantised.py [--quick]

--quick trains a narrower network on fewer images; the full run takes some ten minutes on one core. The last line is
JSON: each figure, the bar beside it (on the ratio only where the CPU has VNNI), and `holds`.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cahfp_cli.data.dataset import Dataset
from cahfp_cli.data.spec import load_data
from cahfp_cli.export.int8_layout import Int8Layout, layout_of_machine
from cahfp_cli.export.onnx_file import export_onnx
from cahfp_cli.export.quantised import CALIBRATION_SAMPLES, Dtype, Quantisation, export_quantised
from cahfp_cli.models.resnet import resnet18
from cahfp_cli.running.evaluation import evaluate_onnx
from cahfp_cli.running.onnx_session import open_session
from cahfp_cli.running.processor import has_vnni, is_x86
from cahfp_cli.significance.measure import subset
from cahfp_cli.training.sgd import TrainOptions, train

RATIO_BAR = 2.0
LOST_BAR = 1.0


@dataclass(frozen=True)
class Size:
    """How much to do. width: of resnet18. images: to train on. tested: test images. calls: of each file."""

    width: float
    images: int
    epochs: int
    tested: int
    calls: int


FULL = Size(0.5, 12_000, 3, 10_000, 400)
QUICK = Size(0.25, 4_000, 2, 2_000, 200)


def make_files(size: Size, training: Dataset, test: Dataset, folder: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """Train, export and convert; the files by name, and the share of test images on which each agrees with fp32."""
    torch.manual_seed(0)
    model = resnet18(training.input_shape, 10, size.width)
    options = TrainOptions(epochs=size.epochs, lr=0.05)
    started = time.process_time()
    train(model, training, options, torch.device("cpu"), lambda done, of, epoch: print(f"epoch {done}: {epoch}"))
    print(f"trained in {time.process_time() - started:.0f} s of CPU time")
    files, agreement = {"fp32": folder / "model.onnx"}, {"fp32": 1.0}
    export_onnx(model, training.input_shape, files["fp32"], {})
    calibration = subset(training, CALIBRATION_SAMPLES, 0).x
    kinds: dict[str, tuple[Dtype, Int8Layout]] = {
        "int8": ("int8", layout_of_machine()),
        "int8, signed": ("int8", Int8Layout("int8")),
        "fp16": ("fp16", layout_of_machine()),
    }
    for name, (dtype, layout) in kinds.items():
        files[name] = folder / f"{name}.onnx"
        wanted = Quantisation(dtype, calibration, test, True, layout)
        agreement[name] = export_quantised(files["fp32"], files[name], wanted).comparison.agreement
    return files, agreement


def milliseconds(files: dict[str, Path], test: Dataset, calls: int) -> dict[str, float]:
    """Median process time of a call with one image, the files in turn, after some calls that do not count."""
    sessions = {name: open_session(path, threads=1) for name, path in files.items()}
    spent: dict[str, list[float]] = {name: [] for name in files}
    for call in range(-20, calls):
        x = np.ascontiguousarray(test.x[[call % len(test)]])
        for name, session in sessions.items():
            started = time.process_time_ns()
            session.run(None, {"input": x})
            if call >= 0:
                spent[name].append((time.process_time_ns() - started) / 1e6)
    return {name: statistics.median(times) for name, times in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a narrower network, fewer images; under two minutes")
    size = QUICK if parser.parse_args().quick else FULL
    torch.set_num_threads(1)
    training = load_data(f"fashion-mnist@train[0:{size.images}]")
    test = load_data(f"fashion-mnist@test[0:{size.tested}]")
    vnni = is_x86() and has_vnni()
    with tempfile.TemporaryDirectory() as folder:
        files, agreement = make_files(size, training, test, Path(folder))
        accuracy = {name: 100 * evaluate_onnx(path, test, 256, threads=1).accuracy for name, path in files.items()}
        spent = milliseconds(files, test, size.calls)
        sizes = {name: path.stat().st_size for name, path in files.items()}
    print(f"\nresnet18, width {size.width}, 28x28, {size.tested} test images; VNNI: {'yes' if vnni else 'no'}\n")
    print("| file | ms a call | ratio | accuracy, % | points lost | same class, % | MB | of fp32, % |")
    print("|---|---|---|---|---|---|---|---|")
    for name in files:
        print(
            f"| {name} | {spent[name]:.3f} | {spent['fp32'] / spent[name]:.2f} | {accuracy[name]:.2f} "
            f"| {accuracy['fp32'] - accuracy[name]:.2f} | {100 * agreement[name]:.2f} | {sizes[name] / 1e6:.2f} "
            f"| {100 * sizes[name] / sizes['fp32']:.1f} |"
        )
    figures: dict[str, Any] = {}
    for name in ("int8", "int8, signed", "fp16"):
        key, held = name.replace(", ", "_"), name == "int8"
        ratio, lost = spent["fp32"] / spent[name], accuracy["fp32"] - accuracy[name]
        figures[f"{key}_ratio"] = {"value": round(ratio, 3), "bar": RATIO_BAR if held and vnni else None}
        figures[f"{key}_points_lost"] = {"value": round(lost, 3), "bar": LOST_BAR if held else None}
        figures[f"{key}_size_share"] = {"value": round(sizes[name] / sizes["fp32"], 3), "bar": None}
    fast = not vnni or spent["fp32"] / spent["int8"] >= RATIO_BAR
    figures["holds"] = fast and accuracy["fp32"] - accuracy["int8"] <= LOST_BAR
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
