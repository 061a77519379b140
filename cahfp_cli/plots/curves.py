"""Curves of accuracy: one line a method, the mean over seeds, in a band of their range."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from cahfp_cli.plots.figure_file import plain_style

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")
"""Colours of Okabe and Ito; what they are too few for gets another stroke."""

Curve = tuple[Sequence[float], Sequence[float]]
"""x and y of one seed."""


@plain_style()
def draw_curves(curves: Mapping[str, Sequence[Curve]], title: str, x_label: str, y_label: str, log: bool) -> Figure:
    """Draw the curves of each method, one for each seed, all of a method with the same number of points. Points that
    are NaN for one seed are left out; a method that has no others is named as not measured.

    Args: log: whether x has a logarithmic scale.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, seeds) in enumerate(curves.items()):
        x = np.mean([curve[0] for curve in seeds], axis=0, dtype=np.float64)
        y = np.array([curve[1] for curve in seeds], np.float64)
        if log:
            x = np.where(x > 0, x, np.nan)
        if np.isnan(x + y.mean(axis=0)).all():
            name += " (not measured)"
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        axes.plot(x, y.mean(axis=0), style, color=colour, label=name, marker=".", markersize=4, linewidth=1.2)
        if len(y) > 1:
            axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.12, linewidth=0)
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=9)
    axes.grid(color="0.9", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    return figure
