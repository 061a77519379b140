#!/usr/bin/env python3
"""CPU time that `cahfp` needs before it does anything: `--help` and `--version`, beside a bare Python.

    python scripts/bench_startup.py [RUNS]

Measures user + system CPU seconds of each command as the kernel counts them when the process ends (os.wait4), so a busy
machine disturbs little; a first run of each, which fills caches, does not count. How to read it: the median is the
figure, the spread between least and most says how far to trust it, and what is beyond `python -c pass` is our imports.
The bar is 0.4 s for `--help`: whoever presses Tab waits that long. The last line is one line of JSON, in seconds.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

BAR_SECONDS = 0.4
CAHFP = str(Path(sys.executable).with_name("cahfp"))
COMMANDS = {
    "help": [CAHFP, "--help"],
    "version": [CAHFP, "--version"],
    "train_help": [CAHFP, "train", "--help"],
    "python_pass": [sys.executable, "-c", "pass"],
}


def cpu_seconds(command: list[str]) -> float:
    """User + system time of one run, children that it waited for included."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    figures: dict[str, float] = {}
    print(f"{'command':<20} {'median':>9} {'least':>9} {'most':>9}   CPU seconds over {runs} runs")
    for name, command in COMMANDS.items():
        cpu_seconds(command)
        times = [cpu_seconds(command) for _ in range(runs)]
        figures[f"{name}_cpu_seconds"] = round(statistics.median(times), 4)
        shown = " ".join([Path(command[0]).name, *command[1:]])
        print(f"{shown:<20} {statistics.median(times):>9.3f} {min(times):>9.3f} {max(times):>9.3f}")
    verdict = "met" if figures["help_cpu_seconds"] < BAR_SECONDS else "NOT met"
    print(f"bar: cahfp --help below {BAR_SECONDS} s: {verdict}")
    print(json.dumps({**figures, "bar_seconds": BAR_SECONDS, "runs": runs}))


if __name__ == "__main__":
    main()
