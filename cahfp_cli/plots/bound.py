"""The terms of the convergence bound by round: a panel a term, a line a method."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cahfp_cli.plots.curves import COLOURS, STYLES
from cahfp_cli.plots.figure_file import plain_style

PANELS = {
    "gradient": "squared gradient of the loss",
    "optimisation": "optimisation: fall of the loss / (eta E)",
    "noise": "gradient noise",
    "dissimilarity": "dissimilarity of clients",
    "pruning": "pruning perturbation",
    "uncovered": "gradient that nobody trains",
}
SIGNED = "optimisation"
Run = Sequence[Mapping[str, float | None]]
"""The terms of each round, None for what was not finite."""


@plain_style()
def draw_bound(methods: Mapping[str, Sequence[Run]], title: str) -> Figure:
    """Means over the runs of each method. Axes are logarithmic and leave out what is not above 0, but for optimisation,
    which is below 0 where a round was a step back."""
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    panels = figure.subplots(2, 3).reshape(-1)
    for axes, (term, label) in zip(panels, PANELS.items(), strict=True):
        for number, (name, runs) in enumerate(methods.items()):
            mean = np.array([[row[term] for row in run] for run in runs], np.float64).mean(axis=0)  # None becomes NaN
            shown = mean if term == SIGNED else np.where(mean > 0, mean, np.nan)
            colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
            axes.plot(np.arange(1, len(mean) + 1), shown, style, color=colour, label=name, marker=".", markersize=3)
        axes.set_yscale("linear" if term == SIGNED else "log")
        axes.set_title(label, fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(which="both", labelsize=6)
        axes.grid(color="0.9", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[3:]:
        axes.set_xlabel("round", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=9)
    return figure
