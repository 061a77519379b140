"""The main job, end to end, with the installed `cahfp` command: what `demo.sh` and `fashion_mnist.sh` run.

train on a public share -> score -> prune for three unlike devices -> each device trains its submodel on its own
non-IID share -> reconstruct -> evaluate. Every command is shown as it is run, so that it can be pasted.

How to read the output: one row a device. `pruned` is the accuracy of the submodel as cut, `trained` after training on
the device's own share, both on the test set; then the global checkpoint's accuracy before the round and after
reconstruction. The last line is one line of JSON with each figure by name.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from cahfp_cli.data.spec import load_data
from cahfp_cli.output import table

CAHFP = Path(sys.executable).with_name("cahfp")
DEVICES = ["jetson-orin-nano:storage=900KB", "raspberry-pi-4:latency=0.75ms", "stm32h743:memory=300KB"]


def parse_device(text: str) -> tuple[str, list[str]]:
    """`NAME:latency=5ms,storage=2MB` as name and flags for `cahfp prune`; a mere name means the profile's budget."""
    name, _, budget = text.partition(":")
    pairs = [pair.partition("=") for pair in budget.split(",") if pair]
    return name, [word for limit, _, value in pairs for word in (f"--{limit}", value)]


def cahfp(*arguments: str | Path) -> dict[str, Any]:
    """Run one command and return its JSON."""
    words = ["cahfp", *map(str, arguments)]
    print("$", shlex.join(words), flush=True)
    done = subprocess.run([CAHFP, *words[1:], "--json", "--quiet"], stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def non_iid_shares(data: str, clients: int, alpha: float, seed: int, folder: Path) -> list[tuple[Path, int]]:
    """Split data among clients: of each class, shares by a Dirichlet distribution; smaller alpha, less alike."""
    dataset = load_data(data)
    random = np.random.default_rng(seed)
    owner = np.zeros(len(dataset), dtype=np.int64)
    for label in range(dataset.classes):
        members = random.permutation(np.flatnonzero(dataset.y == label))
        cuts = (np.cumsum(random.dirichlet([alpha] * clients))[:-1] * len(members)).astype(np.int64)
        for client, part in enumerate(np.split(members, cuts)):
            owner[part] = client
    shares = []
    for client in range(clients):
        path = folder / f"share{client}.npz"
        mine = owner == client
        np.savez(path, x=dataset.x[mine], y=dataset.y[mine], classes=np.int64(dataset.classes))
        shares.append((path, int(mine.sum())))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--model-arg", action="append", default=[])
    parser.add_argument("--device", action="append", help=f"NAME:BUDGET, may be repeated; default {' '.join(DEVICES)}")
    parser.add_argument("--public", default="digits@train[0:150]", help="what the global checkpoint is trained on")
    parser.add_argument("--private", default="digits@train[150:1442]", help="what the devices share among them")
    parser.add_argument("--test", default="digits@test")
    parser.add_argument("--epochs", default="12")
    parser.add_argument("--samples", default="150", help="calibration samples of the public share")
    parser.add_argument("--local-epochs", default="6")
    parser.add_argument("--alpha", type=float, default=1.0, help="of the Dirichlet distribution over clients")
    parser.add_argument("--lr", default="0.005", help="of the devices' own training")
    parser.add_argument("--threads", help="CPU threads; fixed, runs repeat to the byte")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    options = parser.parse_args()
    started = time.monotonic()
    devices = dict(parse_device(text) for text in options.device or DEVICES)
    out: Path = options.output
    if out.exists():
        raise SystemExit(f"{out} exists: remove it, or pass --output with a folder that does not")
    out.mkdir(parents=True)

    threads = ["--threads", options.threads] if options.threads else []
    seed = ["--seed", str(options.seed), *threads]
    checkpoint, scores, merged = out / "global.safetensors", out / "scores.safetensors", out / "global-1.safetensors"
    model_args = [word for pair in options.model_arg for word in ("--model-arg", pair)]
    cahfp(
        "train",
        "--model",
        options.model,
        *model_args,
        "--data",
        options.public,
        "--epochs",
        options.epochs,
        *seed,
        "-o",
        checkpoint,
    )
    cahfp("score", checkpoint, "--data", options.public, "--samples", options.samples, *seed, "-o", scores)
    before = cahfp("evaluate", checkpoint, "--data", options.test, "--no-latency", *threads)
    reports = {}
    for device, budget in devices.items():
        result = cahfp(
            "prune",
            checkpoint,
            "--scores",
            scores,
            "--profile",
            device,
            *budget,
            "--calibration",
            options.public,
            "--data",
            options.test,
            "-o",
            out / "cut",
            *seed,
        )
        reports[device] = result["submodels"][0]
    shares = non_iid_shares(options.private, len(devices), options.alpha, options.seed, out)
    trained = {}
    for device, (share, _) in zip(devices, shares, strict=True):
        trained[device] = cahfp(
            *("train", out / "cut" / device, "--data", f"npz:{share}", "--test-data", options.test),
            *("--epochs", options.local_epochs, "--lr", options.lr, *seed, "-o", out / f"trained-{device}"),
        )
    cahfp("reconstruct", checkpoint, *(out / f"trained-{device}" for device in devices), "-o", merged)
    after = cahfp("evaluate", merged, "--data", options.test, "--no-latency", *threads)

    rows = []
    figures: dict[str, Any] = {"global_before": before["accuracy"], "global_after": after["accuracy"], "devices": {}}
    for (device, report), (_, samples) in zip(reports.items(), shares, strict=True):
        predicted, full = report["predicted"], report["full"]
        pruned, local = report["evaluation"]["after"]["accuracy"], trained[device]["test"]["accuracy"]
        rows.append(
            [
                device,
                f"{report['groups']['kept']}/{report['groups']['of']}",
                f"{predicted['params'] / 1e3:.0f}K ({predicted['params'] / full['params']:.0%})",
                f"{predicted['macs'] / 1e6:.2f}M ({predicted['macs'] / full['macs']:.0%})",
                f"{predicted['latency_seconds'] * 1e3:.2f} ms",
                f"{report['onnx']['bytes'] / 1e6:.2f} MB",
                str(samples),
                f"{pruned:.1%}",
                f"{local:.1%}",
            ]
        )
        figures["devices"][device] = {
            "groups": report["groups"]["kept"],
            "params": predicted["params"],
            "macs": predicted["macs"],
            "predicted_latency_seconds": predicted["latency_seconds"],
            "onnx_bytes": report["onnx"]["bytes"],
            "samples": samples,
            "accuracy_pruned": pruned,
            "accuracy_trained": local,
        }
    columns = ["device", "channels kept", "params", "MACs", "latency", "ONNX", "samples", "pruned", "trained"]
    print(f"\n{table(columns, rows)}\n")
    print(f"global accuracy: {before['accuracy']:.1%} before, {after['accuracy']:.1%} after reconstruction")
    print(f"({options.model}, test data {options.test}, latency predicted from the profile; files in {out})\n")
    print(json.dumps({**figures, "seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main()
