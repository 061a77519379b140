"""Every format and every command once, in an empty folder: what two versions of cahfp make of the same inputs.

    python scripts/golden.py FOLDER                 writes it; then `diff -r` two folders made on one machine
    python scripts/golden.py FOLDER --keep tests/golden     also renews the files that tests hold later versions to

All paths are relative and all seeds fixed, so that a version that changes nothing makes the same bytes, but for the
versions and the seconds that outputs tell. `log/NN-COMMAND.txt` is what a command said: its exit code, standard output
and standard error.
"""

import argparse
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).with_name("cahfp")
MODEL = "--model resnet20 --model-arg width=0.125"
CALIBRATION = "--calibration digits@train[:64] --samples 32 --rounds 2"
NARROW = "--dtype int8 --dtype fp16"
QUICK = "--threads 1 --quiet --json"
EXPERIMENT = """
partitions = ["iid"]
methods = ["cahfp", "heterofl", "fedavg"]
rounds = 1
clients_per_round = 2
[model]
spec = "resnet20"
args = { width = 0.125 }
[data]
train = "digits@train[0:120]"
test = "digits@test[0:40]"
[[fleet]]
count = 2
keep = 0.5
[selection]
samples = 8
"""
COMMANDS = f"""
train {MODEL} --data digits@train[:400] --steps 60 --test-data digits@test -o global.safetensors {QUICK}
score global.safetensors --data digits@train[:64] --samples 32 -o scores.safetensors {QUICK}
score global.safetensors --criterion l1 -o l1.safetensors {QUICK}
score global.safetensors --criterion gate-taylor --data digits@train[:32] --samples 16 -o taylor.safetensors {QUICK}
prune global.safetensors --scores scores.safetensors --profile stm32h743 --profile pi4 --macs 0.6 -o fleet {QUICK}
prune global.safetensors --scores scores.safetensors --keep 0.5 {NARROW} {CALIBRATION} -o compensated {QUICK}
prune global.safetensors --scores l1.safetensors --params 0.5 --no-onnx -o cut --threads 1
prune global.safetensors --scores scores.safetensors --profile pi4 --latency 1ns --no-onnx -o never --threads 1
prune global.safetensors --scores scores.safetensors -o never --threads 1
train fleet/stm32h743 --data digits@train[:64] --steps 4 --curvature 8 --no-onnx -o client-a {QUICK}
train cut --data digits@train[64:128] --steps 4 --no-onnx -o client-b {QUICK}
evaluate global.safetensors --data digits@test[:64] --no-latency --threads 1
evaluate fleet/stm32h743 --data digits@test[:64] --no-latency {QUICK}
evaluate fleet/stm32h743/model.onnx --data digits@test[:64] --no-latency {QUICK}
reconstruct global.safetensors client-a client-b -o merged.safetensors --report merge.json --html merge.html
reconstruct global.safetensors client-a client-b --rule fill -o filled.safetensors {QUICK}
reconstruct global.safetensors client-a client-b --rule trimmed-mean --trim 0.4 -o trimmed.safetensors {QUICK}
reconstruct global.safetensors client-a --partial -o a.partial.safetensors {QUICK}
reconstruct global.safetensors a.partial.safetensors client-b -o again.safetensors {QUICK}
reconstruct global.safetensors client-a never -o nothing.safetensors
inspect global.safetensors
inspect global.safetensors --groups --json
inspect scores.safetensors --json
inspect fleet --json
inspect compensated
inspect merge.json --json
inspect a.partial.safetensors
profile list
profile show jetson-orin-nano
profile predict fleet/stm32h743 --profile stm32h743 --json
simulate experiment.toml -o simulation --quiet
inspect simulation --json
reconstruct global.safetensors client-a
prune
evaluate missing.safetensors --data digits
"""
FIELD = re.compile(r'"seconds": [0-9.e-]+')
LAST_COLUMN = re.compile(r"(?m)^((?:cahfp|heterofl|fedavg) .*) \d+$")
SECONDS = re.compile(r"\b\d+(\.\d+)?(e-?\d+)? ?(s|ms|us|seconds)\b")
KEPT = (
    *("global.safetensors", "scores.safetensors", "fleet/stm32h743", "compensated/submodel.safetensors"),
    *("compensated/index_map.safetensors", "compensated/report.json", "client-a", "cut", "client-b"),
    *("merged.safetensors", "merge.json", "merge.html", "a.partial.safetensors", "experiment.toml"),
)


def run_all(folder: Path) -> None:
    """Raises: FileExistsError: the folder is there."""
    (folder / "log").mkdir(parents=True)
    (folder / "experiment.toml").write_text(EXPERIMENT)
    for number, line in enumerate(COMMANDS.strip().splitlines()):
        arguments = shlex.split(line)
        done = subprocess.run([COMMAND, *arguments], cwd=folder, capture_output=True, text=True, check=False)
        said = f"$ cahfp {line}\nexit code {done.returncode}\n--- stdout\n{done.stdout}--- stderr\n{done.stderr}"
        (folder / "log" / f"{number:02}-{arguments[0]}.txt").write_text(timeless(said))
    for file in (folder / "simulation").rglob("*.json*"):
        file.write_text(timeless(file.read_text()))


def timeless(text: str) -> str:
    """Without the seconds that anything took."""
    return LAST_COLUMN.sub(r"\1 N", SECONDS.sub("N s", FIELD.sub('"seconds": 0', text)))


def keep(made: Path, kept: Path) -> None:
    """Copy what tests hold later versions to, and what `inspect` says of it today."""
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for name in KEPT:
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (made / name).is_dir() else shutil.copy)(made / name, kept / name)
    said = {}
    for name in KEPT:
        done = subprocess.run([COMMAND, "inspect", name, "--json"], cwd=kept, capture_output=True, check=True)
        said[name] = json.loads(done.stdout)
    (kept / "inspect.json").write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
    files = sorted(file for file in kept.rglob("*") if file.is_file())
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(kept)}\n" for file in files]
    (kept / "SHA256SUMS").write_text("".join(sums))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    run_all(options.folder)
    if options.keep is not None:
        keep(options.folder, options.keep)


if __name__ == "__main__":
    main()
