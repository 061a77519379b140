"""What `cahfp simulate` shows while it runs: a table that renews itself on a terminal, notes on a pipe."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cahfp_cli.output import Console, Json

if TYPE_CHECKING:
    from rich.table import Table

OnRound = Callable[[str, str, int, Json], None]
"""Called with partition, method, seed and the figures of a round."""
Runs = dict[tuple[str, str, int], list[str]]
"""By partition, method and seed: the other cells of the row."""
COLUMNS = ("partition", "method", "seed", "round", "loss", "global, %", "deployed, %", "up, MB", "seconds")
OTHER_LINES = 6
"""Of a terminal: the head of the table, and what stands around it."""


@contextmanager
def watched(console: Console, rounds: int) -> Iterator[OnRound]:
    """Yield what is to be called after each round. Warnings are printed either way, above the table."""

    def noted(partition: str, method: str, seed: int, row: Json) -> None:
        warn(console, partition, method, seed, row)
        if "accuracy" in row:
            found = row["accuracy"]
            console.note(
                f"{partition}, {method}, seed {seed}, round {row['round']}/{rounds}: "
                f"global {percent(found['recalibrated'])}%, deployed {percent(found['deployed'])}%"
            )

    if console.quiet or console.json or not sys.stderr.isatty():
        yield noted
        return

    from rich.console import Console as RichConsole
    from rich.live import Live

    screen, runs, seconds = RichConsole(stderr=True), Runs(), dict[tuple[str, str, int], float]()
    with Live(console=screen, transient=True, auto_refresh=False) as live:

        def shown(partition: str, method: str, seed: int, row: Json) -> None:
            warn(console, partition, method, seed, row)
            key = (partition, method, seed)
            seconds[key] = seconds.get(key, 0.0) + row["seconds"]
            before = runs.pop(key, None)  # so that the run that moved last is at the end
            runs[key] = cells(row, rounds, seconds[key], before)
            live.update(live_table(runs, max(1, screen.height - OTHER_LINES)), refresh=True)

        yield shown


def warn(console: Console, partition: str, method: str, seed: int, row: Json) -> None:
    """Say which clients were dropped or not scored, and why a round failed or could not be evaluated."""
    place = f"{partition}, {method}, seed {seed}, round {row['round']}"
    for client, why in row["dropped"].items():
        console.warn(f"{place}: client {client} dropped: {why}")
    for client, why in row["unscored"].items():
        console.warn(f"{place}: client {client} keeps its mask: {why}")
    missing: dict[str, list[str]] = {}
    for name, why in row.get("accuracy", {}).get("missing", {}).items():
        missing.setdefault(why, []).append(name)
    for why, names in missing.items():
        console.warn(f"{place}: {', '.join(names)}: missing: {why}")
    if row.get("bound_missing"):
        console.warn(f"{place}: terms of the bound: missing: {row['bound_missing']}")
    if row["failed"] is not None:
        console.warn(f"{place}: the global checkpoint stays as it was: {row['failed']}")


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def cells(row: Json, rounds: int, seconds: float, before: list[str] | None) -> list[str]:
    """From `round` on; accuracies stay those of the last evaluation, loss is "failed" where nothing was merged.

    Args: seconds: of all rounds so far. before: the cells of the round before.
    """
    accuracy = before[2:4] if before else ["", ""]
    if "accuracy" in row:
        accuracy = [percent(row["accuracy"][name]) for name in ("recalibrated", "deployed")]
    loss = "failed" if row["loss"] is None else f"{row['loss']:.3f}"
    return [f"{row['round']}/{rounds}", loss, *accuracy, f"{row['uploaded_bytes'] / 1e6:.1f}", f"{seconds:.0f}"]


def live_table(runs: Runs, most: int) -> "Table":
    """The last `most` runs that moved."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    for (partition, method, seed), rest in list(runs.items())[-most:]:
        table.add_row(*map(Text, [partition, method, str(seed), *rest]))  # as text: it holds no markup
    return table
