"""How fast a device computes against how much it computes with each byte: the roofline of a profile."""

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cahfp_cli.device.latency import CLASSES, rates_of
from cahfp_cli.device.profile import DeviceProfile
from cahfp_cli.plots.figure_file import plain_style

INTENSITY = np.logspace(-1, 3, 200)
"""Operations a byte moved."""
COLOURS = {
    "conv": "#0072B2",
    "narrow": "#56B4E9",
    "odd": "#D55E00",
    "odd_pointwise": "#F0E442",
    "depthwise": "#009E73",
    "odd_depthwise": "#E69F00",
    "matmul": "#CC79A7",
}
"""Of Okabe and Ito."""


def reached(profile: DeviceProfile, kernel: str) -> NDArray[np.float64]:
    """Operations a second of a kernel class at each `INTENSITY`, start-up left out; float64."""
    rates, number = rates_of(profile), CLASSES.index(kernel)
    return np.asarray(1.0 / (rates.operation[number] + rates.byte[number] / INTENSITY))


@plain_style()
def draw_roofline(profile: DeviceProfile) -> Figure:
    """One line a kernel class of a calibrated profile, else one for all and the roof of its peaks."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    if profile.calibration is None:
        peak, bandwidth = profile.compute.fp32.reached, profile.memory.reached
        axes.plot(INTENSITY, np.minimum(peak, bandwidth * INTENSITY) / 1e9, color="0.6", linestyle="--", label="roof")
        axes.plot(INTENSITY, reached(profile, "conv") / 1e9, color=COLOURS["conv"], label="predicted, every operator")
    else:
        with np.errstate(divide="ignore"):
            for kernel, colour in COLOURS.items():
                line = reached(profile, kernel) / 1e9
                if np.isfinite(line).all():
                    axes.plot(INTENSITY, line, color=colour, label=kernel.replace("_", " "))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte of activations")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"{profile.name}, fp32", fontsize=9)
    axes.grid(color="0.9", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    return figure
