"""Figures as files: equal figures give equal bytes, whatever the user's matplotlib is set to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from cahfp_cli.checkpoint.atomic import atomic_file
from cahfp_cli.errors import UsageError

METADATA = {  # None leaves out what matplotlib would write of itself and of the time
    ".png": {"Software": None},
    ".svg": {"Creator": None, "Date": None},
    ".pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}
DOTS_PER_INCH = 150


def figure_suffix(path: Path) -> str:
    """What kind of figure a file name asks for, a key of METADATA. Raises: UsageError: none that we write."""
    suffix = path.suffix.lower()
    if suffix not in METADATA:
        raise UsageError(f"{path}: a figure is written as {', '.join(METADATA)}; name a file that ends so.")
    return suffix


@contextmanager
def plain_style() -> Iterator[None]:
    """Matplotlib's own defaults while the block runs: figures are both made and written in it."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.hashsalt"] = "cahfp"  # else the identifiers in the file are random
        yield


@plain_style()
def save_figure(figure: Figure, path: Path, force: bool = False) -> None:
    """Write a figure as its file name says (.png, .svg, .pdf), whole or not at all.

    Raises: UsageError: another suffix. InputError: `path` exists without `force`, or cannot be written.
    """
    suffix = figure_suffix(path)
    with atomic_file(path, force) as temporary:
        figure.savefig(temporary, format=suffix[1:], dpi=DOTS_PER_INCH, metadata=METADATA[suffix])
