"""How many clients of a round train each entry of the weights: by round, and by layer; a panel a method."""

from collections.abc import Mapping, Sequence
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cahfp_cli.plots.figure_file import plain_style

COLUMNS = 4
PANEL_INCHES = (2.4, 1.9)
NONE, SHADES = "#D55E00", ("#D6E6F4", "#08306B")
"""Entries that nobody trains, and those that one client to all clients train."""
Shares = NDArray[np.float64]
"""(places, clients + 1): of each place the share of entries that 0, 1, ... clients train; rows sum to 1."""
Rounds = Sequence[Mapping[str, Sequence[int]]]
"""Of each round of a run: how many entries of each layer 0, 1, ... clients train; empty where the round failed."""


def by_round(runs: Sequence[Rounds], clients: int) -> Shares:
    """Over all layers, mean over runs; a failed round trains nothing."""
    counts = np.array(
        [[sum((_padded(c, clients) for c in r.values()), _nothing(clients)) for r in run] for run in runs]
    )
    return np.asarray(_shares(counts).mean(axis=0))


def by_layer(runs: Sequence[Rounds], clients: int) -> tuple[list[str], Shares]:
    """Names of the layers, and for each the mean over the rounds of all runs that did not fail."""
    rounds = [one for run in runs for one in run if one]
    names = list(rounds[0]) if rounds else []
    shares = [_shares(np.array([_padded(one[name], clients) for one in rounds])).mean(axis=0) for name in names]
    return names, np.array(shares).reshape(-1, clients + 1)


@plain_style()
def draw_by_round(methods: Mapping[str, Shares], title: str) -> Figure:
    """Stacked areas over rounds."""
    figure, panels = _panels(methods, title)
    for axes, shares in zip(panels, methods.values(), strict=True):
        edges = np.arange(len(shares) + 1) + 0.5
        below = np.zeros(len(shares))
        for colour, share in zip(_colours(shares), shares.T, strict=True):
            axes.stairs(below + share, edges, baseline=below, fill=True, color=colour)
            below = below + share
        axes.set_xlim(edges[0], edges[-1])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, 1)
    figure.supxlabel("round", fontsize=8)
    figure.supylabel("share of the weights' entries", fontsize=8)
    return figure


@plain_style()
def draw_by_layer(methods: Mapping[str, tuple[Sequence[str], Shares]], title: str) -> Figure:
    """A stacked bar for each layer, the first one on top."""
    figure, panels = _panels({name: shares for name, (_, shares) in methods.items()}, title)
    for number, (axes, (layers, shares)) in enumerate(zip(panels, methods.values(), strict=True)):
        places, below = np.arange(len(layers)), np.zeros(len(layers))
        for colour, share in zip(_colours(shares), shares.T, strict=True):
            axes.barh(places, share, left=below, height=0.85, color=colour, linewidth=0)
            below = below + share
        axes.set_yticks(places, [name.removesuffix(".weight") for name in layers] if number % COLUMNS == 0 else [])
        axes.tick_params(axis="y", labelsize=4 if len(layers) > 12 else 6, length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
    figure.supxlabel("share of the weights' entries, mean over rounds", fontsize=8)
    return figure


def _panels(methods: Mapping[str, Shares], title: str) -> tuple[Figure, list[Axes]]:
    """A figure with a titled panel for each method, and a legend of colours."""
    columns, rows = min(COLUMNS, len(methods)), ceil(len(methods) / COLUMNS)
    size = (max(6.4, columns * PANEL_INCHES[0]), rows * PANEL_INCHES[1] + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axes, name in zip(grid, methods, strict=False):
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=6)
    for axes in grid[len(methods) :]:
        axes.remove()
    colours = _colours(next(iter(methods.values())))
    texts = ["no client", *(f"{number}" for number in range(1, len(colours)))]
    handles = [Patch(color=colour, label=text) for colour, text in zip(colours, texts, strict=True)]
    if len(handles) > 8:  # the ends of the scale say enough
        handles = [handles[0], handles[1], handles[len(handles) // 2], handles[-1]]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=9)
    return figure, list(grid[: len(methods)])


def _colours(shares: Shares) -> list[str]:
    lightest, darkest = (np.array(to_rgb(shade)) for shade in SHADES)
    levels = np.linspace(0, 1, max(1, shares.shape[1] - 1))
    return [NONE, *(to_hex(lightest + level * (darkest - lightest)) for level in levels)]


def _padded(counts: Sequence[int], clients: int) -> Shares:
    """Of fewer clients than were to take part, as of all of them."""
    return np.array([*counts, *[0] * (clients + 1 - len(counts))], np.float64)


def _nothing(clients: int) -> Shares:
    return np.zeros(clients + 1)


def _shares(counts: Shares) -> Shares:
    """Counts (..., clients + 1) as shares; where there are none, all is trained by nobody."""
    total = counts.sum(axis=-1, keepdims=True)
    nobody = np.zeros(counts.shape[-1])
    nobody[0] = 1.0
    return np.where(total > 0, counts / np.maximum(total, 1), nobody)
