"""A long fuzz: odd networks through every command, option values over their whole range, damaged files.

Each case follows from --seed and its number, and runs in a process of its own with limits. A case that ends in exit
code 1, a traceback, a signal or out of time, or whose files do not pass checks that share no code with the product
(tests/support/independent.py), is a fault.

    python scripts/fuzz.py -o fuzz.jsonl --cases 0:2000        runs those that the file does not have for this commit
    python scripts/fuzz.py -o fuzz.jsonl --cases 17:18 --keep FOLDER    runs case 17 again and leaves its files

The results file gets one JSON line a case; faults are printed. The last line is JSON: cases by kind, faults, `holds`.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

from forked import Limits, each  # noqa: E402
from zoo import commit, preload  # noqa: E402

from tests.support import fuzz  # noqa: E402

KINDS = ("network", "options", "damage", "options", "damage")
"""Of cases in turn; networks take longest."""


def kind_of(case: int) -> str:
    return KINDS[case % len(KINDS)]


def one_case(case: int, seed: int, fleet: fuzz.Fleet, home: Path) -> list[str]:
    """The faults of a case."""
    random = Random(f"{seed}/{case}")
    match kind_of(case):
        case "network":
            (home / "odd").mkdir()
            return fuzz.with_odd_network(random, home / "odd")
        case "options":
            return fuzz.with_options(fleet, random, home / "files")
    return fuzz.with_damage(fleet, random, home / "files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="results, one JSON line a case")
    parser.add_argument("--cases", default="0:500", help="FIRST:LAST, the last not included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(set(KINDS)), help="only cases of this kind")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--limit", type=float, default=120, help="seconds a case")
    parser.add_argument("--memory", type=float, default=4, help="GB a case")
    parser.add_argument("--keep", type=Path, help="copy the files of each case there, and run what was run before too")
    options = parser.parse_args()
    first, _, last = options.cases.partition(":")
    tried = commit()
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    there = {r["case"] for r in map(json.loads, lines) if r["commit"] == tried and r["seed"] == options.seed}
    cases = [n for n in range(int(first), int(last)) if options.keep or n not in there]
    cases = [n for n in cases if options.kind in (None, kind_of(n))]
    warnings.simplefilter("ignore")
    preload([])
    found: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="cahfp-fleet-") as folder:
        make_fleet(Path(folder))

        def work(case: int, home: Path) -> None:
            import torch

            torch.set_num_threads(1)
            (home / "faults.json").write_text(json.dumps(one_case(case, options.seed, fuzz.Fleet(Path(folder)), home)))

        for case, home, ending in each(cases, work, Limits(options.limit, options.memory, options.jobs)):
            told = home / "faults.json"
            if told.exists():
                faults = json.loads(told.read_text())
            else:
                noise = (home / "noise.txt").read_text().strip()
                faults = [f"{ending}: {noise[-600:]}"]
            record = {"case": case, "kind": kind_of(case), "seed": options.seed, "commit": tried, "faults": faults}
            found.append(record)
            with options.output.open("a") as file:
                file.write(json.dumps(record) + "\n")
            for fault in faults:
                print(f"case {case}: {fault}", flush=True)
            if options.keep:
                shutil.copytree(home, options.keep / str(case))
    counts = {kind: sum(r["kind"] == kind for r in found) for kind in sorted(set(KINDS))}
    wrong = sum(bool(record["faults"]) for record in found)
    print(json.dumps({"cases": len(found), **counts, "with_faults": wrong, "holds": wrong == 0}))


def make_fleet(folder: Path) -> None:
    """The good files, made in a process of its own too: nothing may have started threads before the others fork."""

    def work(number: int, home: Path) -> None:
        fuzz.good_files(folder)

    started = time.monotonic()
    for _, home, ending in each([0], work, Limits(600, 8)):
        if ending or not (folder / "part.partial.safetensors").exists():
            raise SystemExit(f"the good files cannot be made: {ending} {(home / 'noise.txt').read_text()[-800:]}")
    print(f"good files made in {time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
