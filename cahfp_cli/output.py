"""Where text goes: results to standard output, everything else to standard error."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
Progress = Callable[[int, int], None]
"""Called with (done, total); core packages report through it and know nothing of terminals."""


@dataclass(frozen=True)
class Console:
    """One command's voice: `json` prints one object, `quiet` leaves only results and errors."""

    json: bool = False
    quiet: bool = False

    def result(self, human: str, machine: Json) -> None:
        """Print the command's result: the text `human`, or with `--json` the object `machine`."""
        sys.stdout.write(json.dumps(machine, indent=2, sort_keys=True, allow_nan=False) if self.json else human)
        sys.stdout.write("\n")

    def note(self, text: str) -> None:
        """Say something in passing (progress, hints) on standard error."""
        if not self.quiet:
            sys.stderr.write(text + "\n")

    def warn(self, text: str) -> None:
        """Say something the user should know even when `--quiet`."""
        sys.stderr.write(f"warning: {text}\n")

    @contextmanager
    def progress(self, label: str, of_bytes: bool = False) -> Iterator[Progress]:
        """A progress bar on a terminal, of bytes with their rate; silence in a pipe, in CI and with `--quiet`."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda done, total: None
            return
        from rich.console import Console as RichConsole
        from rich.progress import Progress as RichProgress
        from rich.progress import TransferSpeedColumn

        columns = [*RichProgress.get_default_columns(), *([TransferSpeedColumn()] if of_bytes else [])]
        with RichProgress(*columns, console=RichConsole(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table, columns padded with spaces: first column left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(columns), line(["-" * w for w in widths]), *(line(row) for row in rows)])
