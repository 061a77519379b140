"""Where text goes: results to standard output, everything else to standard error, and with `--log` to a file too."""

import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

Json = dict[str, Any]
Progress = Callable[[int, int], None]
"""Called with (done, total); core packages report through it and know nothing of terminals."""


class Patient(io.FileIO):
    """A standard stream whose reader may leave: what it does not want is dropped, and the work goes on.

    A disk that is full is an error once; what follows is dropped too, so that the interpreter can end.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                raise
            return len(memoryview(data).cast("B"))


def prepare_streams() -> None:
    """Make standard streams that neither a reader who leaves nor a name that is no text can break.

    A stream that was closed from the start goes nowhere; else the first file opened would take its number, and get
    what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    if sys.stdout is sys.__stdout__:  # not those that a caller of `main` has put in their place
        sys.stdout = patient(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = patient(2, sys.stderr)


def patient(number: int, stream: TextIO | None) -> TextIO:
    """A stream like `stream`, which is None where it was closed, on the file descriptor `number`."""
    if stream is not None:
        stream.flush()
    encoding = "utf-8" if stream is None else stream.encoding
    buffer = io.BufferedWriter(Patient(number, "w", closefd=False))
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=number == 2 or os.isatty(number))


class Log:
    """A file to which lines are appended, each with its time and level; nothing until it is opened.

    A disk that is full ends the log with a warning, not the work.
    """

    def __init__(self) -> None:
        self.path = Path()
        self.file: io.FileIO | None = None
        self.show_warning = warnings.showwarning

    def open(self, path: Path) -> None:
        """Raises: OSError: it cannot be written."""
        self.path, self.file = path, path.open("ab", buffering=0)
        self.show_warning, warnings.showwarning = warnings.showwarning, self.warn

    def close(self) -> None:
        if self.file is not None:
            warnings.showwarning = self.show_warning
            self.file.close()
            self.file = None

    def write(self, level: str, text: str) -> None:
        if self.file is None:
            return
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        lines = "".join(f"{now} {level:<7} {line}\n" for line in text.splitlines())
        try:
            self.file.write(lines.encode("utf-8", "backslashreplace"))
        except OSError as error:
            self.close()
            sys.stderr.write(f"warning: {self.path}: {error.strerror}; the log ends here\n")

    def warn(self, message: Any, category: Any, *where: Any, **more: Any) -> None:
        """In place of `warnings.showwarning`: what libraries warn of is shown as ever, and kept."""
        self.show_warning(message, category, *where, **more)
        self.write("WARNING", f"{category.__name__}: {message}")


LOG = Log()
"""That of this process, as standard error is."""


def say(text: str, level: str = "INFO") -> None:
    """A line on standard error, and in the log if there is one."""
    sys.stderr.write(text + "\n")
    LOG.write(level, text)


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
            say(text)

    def warn(self, text: str) -> None:
        """Say something the user should know even when `--quiet`."""
        say(f"warning: {text}", "WARNING")

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
