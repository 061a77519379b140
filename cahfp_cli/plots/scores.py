"""Significance of every channel group, a panel a family, and where a budget cut."""

from math import ceil, floor, sqrt
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from cahfp_cli.errors import InputError
from cahfp_cli.formats.files import INDEX_MAP, REPORT
from cahfp_cli.formats.index_map_file import read_index_map
from cahfp_cli.formats.report import kept_groups, read_report
from cahfp_cli.plots.figure_file import plain_style
from cahfp_cli.significance.scores import Scores

MOST_PANELS, MOST_COLUMNS = 48, 8
PANEL_INCHES = (2.1, 1.65)
LEAST_INCHES = (6.4, 4.2)
KEPT, REMOVED = "#0072B2", "#D55E00"  # blue and vermilion of Okabe and Ito: apart in every kind of colour vision
SMALLEST_SHARE = 1e-9  # of the largest value; below it, a symmetric logarithmic axis is linear
SMALLEST, LARGEST = 1e-280, 1e280  # less is drawn as 0 and more as this: matplotlib's arithmetic ends near them


def kept_mask(scores: Scores, submodel: Path) -> NDArray[np.bool_]:
    """Which groups a submodel folder holds, bool (groups,).

    Raises: InputError: it is not a sound submodel of the checkpoint that was scored.
    """
    if not submodel.is_dir():
        raise InputError(f"{submodel}: it is not a folder; a submodel folder, as `cahfp prune` writes it, is expected.")
    digest, belongs_to = scores.metadata.checkpoint, read_index_map(submodel / INDEX_MAP).checkpoint
    if belongs_to != digest:
        raise InputError(
            f"{submodel / INDEX_MAP}: it belongs to another checkpoint than the scores (digest {belongs_to[:12]}..., "
            f"not {digest[:12]}...).\nPass a submodel that was cut by these scores."
        )
    path = submodel / REPORT
    report = read_report(path)
    kept = np.zeros(len(scores.family), dtype=np.bool_)
    kept[kept_groups(path, report, len(kept))] = True
    if report.get("widths") != widths(scores, kept):
        raise InputError(f"{path}: its widths are not those of its kept_groups in these scores; prune again.")
    return kept


def widths(scores: Scores, kept: NDArray[np.bool_]) -> list[dict[str, str | int]]:
    """Kept and all groups a family, as a report lists them."""
    names = scores.metadata.families
    left = np.bincount(scores.family[kept], minlength=len(names)).tolist()
    whole = np.bincount(scores.family, minlength=len(names)).tolist()
    return [{"family": name, "kept": k, "of": of} for name, k, of in zip(names, left, whole, strict=True)]


@plain_style()
def draw_scores(scores: Scores, kept: NDArray[np.bool_] | None = None) -> Figure:
    """One panel a family: its groups by significance, the largest first, on an axis that all panels share.

    The axis is logarithmic, or symmetrically so if a value is 0 or less. Beyond MOST_PANELS families the last are left
    out, and the title says so.

    Args: kept: bool (groups,), what a submodel holds; None draws all groups alike.
    Raises: InputError: there is no group to draw.
    """
    families = np.unique(scores.family).tolist()
    if not families:
        raise InputError("the scores hold no channel group, so there is nothing to draw.")
    significance = np.where(np.abs(scores.significance) < SMALLEST, 0, scores.significance).clip(-LARGEST, LARGEST)
    shown = families[:MOST_PANELS]
    columns = min(round(sqrt(1.5 * len(shown))), MOST_COLUMNS)
    rows = ceil(len(shown) / columns)
    size = (max(columns * PANEL_INCHES[0], LEAST_INCHES[0]), max(rows * PANEL_INCHES[1] + 0.9, LEAST_INCHES[1]))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes, family in zip(panels, shown, strict=False):
        own = scores.family == family
        draw_family(axes, significance[own], None if kept is None else kept[own], 72 * size[0] / columns)
        width = counted(own.sum(), "group") if kept is None else f"{kept[own].sum()}/{own.sum()}"
        name = shortened(scores.metadata.families[family].removesuffix(".weight"))
        axes.set_title(f"{name}\n{width}", fontsize=7, parse_math=False)
    for axes in panels[len(shown) :]:
        axes.remove()
    scale(panels[0], significance[np.isin(scores.family, shown)])
    omitted = f", the first {len(shown)} of them shown" if len(shown) < len(families) else ""
    figure.suptitle(
        f"{shortened(scores.metadata.criterion)}: {counted(len(scores.family), 'channel group')} in "
        f"{counted(len(families), 'family', 'families')}{omitted}",
        fontsize=10,
        parse_math=False,
    )
    figure.supxlabel("rank within the family", fontsize=8)
    figure.supylabel("significance", fontsize=8)
    if kept is not None:
        handles = [
            Line2D([], [], color=KEPT, marker="o", markersize=4, linestyle="", label=f"kept ({kept.sum()})"),
            Line2D([], [], color=REMOVED, marker="x", markersize=4, linestyle="", label=f"removed ({(~kept).sum()})"),
        ]
        figure.legend(handles=handles, loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    return figure


def draw_family(
    axes: Axes, significance: NDArray[np.float64], kept: NDArray[np.bool_] | None, points_wide: float
) -> None:
    """A panel. Its markers carry the gid `kept` or `removed`; a line marks the cut where one rank parts the two."""
    count = len(significance)
    alive = np.ones(count, dtype=np.bool_) if kept is None else kept
    order = np.lexsort((~alive, -significance))  # of equal values the kept ones first
    alive, significance = alive[order], significance[order]
    rank = np.arange(1, count + 1)
    size = float(np.clip(0.7 * points_wide / count, 1.5, 4))
    for gid, mask, colour, marker in (("kept", alive, KEPT, "o"), ("removed", ~alive, REMOVED, "x")):
        axes.plot(rank[mask], significance[mask], color=colour, marker=marker, markersize=size, linestyle="", gid=gid)
    left = int(alive.sum())
    if 0 < left < count and alive[:left].all():
        axes.axvline(left + 0.5, color="0.4", linewidth=0.8, linestyle="--", gid="cut")
    axes.set_xlim(0.5 - 0.04 * count, count + 0.5 + 0.04 * count)
    axes.set_xticks(sorted({1, count}))
    axes.tick_params(labelsize=6)
    axes.tick_params(which="minor", length=1.5, labelsize=6)
    axes.grid(axis="y", color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def scale(axes: Axes, significance: NDArray[np.float64]) -> None:
    """Set the axis of significance, which the panels share."""
    if (significance > 0).all():
        axes.set_yscale("log")
        return
    sizes = np.abs(significance[significance != 0])
    if not sizes.size:
        return
    linear = max(sizes.min(), sizes.max() * SMALLEST_SHARE)
    decades = 10.0 ** np.arange(ceil(np.log10(linear)), floor(np.log10(sizes.max())) + 1)
    low, high = significance.min(), significance.max()
    if not decades.size or low == high:
        return
    axes.set_yscale("symlog", linthresh=linear)
    ticks = decades[:: -ceil(len(decades) / (2 if low < 0 < high else 4))]
    ticks = np.unique([-ticks, 0 * ticks, ticks])
    axes.set_yticks(ticks[(low <= ticks) & (ticks <= high)])
    axes.set_yticks([], minor=True)
    # Matplotlib's own margin would give a lone zero as much room as all that is positive.
    curve = axes.yaxis.get_transform()
    ends = curve.transform(np.array([low, high]))
    margin = 0.05 * (ends[1] - ends[0]) * np.array([-1, 1])
    axes.set_ylim(*curve.inverted().transform(ends + margin))


def shortened(name: str, most: int = 30) -> str:
    """A name from a file for a title: printable ASCII, of a long one the beginning and the end."""
    text = ascii(name)[1:-1]
    return text if len(text) <= most else f"{text[: most // 2 - 3]}…{text[-most // 2 - 2 :]}"


def counted(number: int | np.integer, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
