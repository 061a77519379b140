"""`cahfp profile show --plot`: the roofline of a profile from paper and of a calibrated one."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cahfp_cli.device.catalogue import load_profile
from cahfp_cli.plots.roofline import INTENSITY, draw_roofline, reached
from tests.device.test_latency import calibrated, made_up
from tests.support.commands import run, run_well


def test_the_command_draws_a_picture_and_does_not_overwrite_it(tmp_path: Path) -> None:
    picture = tmp_path / "pi.png"
    run_well("profile", "show", "pi5", "--plot", picture)
    assert min(Image.open(picture).size) > 300
    assert run("profile", "show", "pi5", "--plot", picture).code == 3
    assert run("profile", "show", "pi5", "--plot", tmp_path / "pi.txt").code == 2


def test_paper_is_half_of_its_roof_where_computing_and_moving_take_as_long() -> None:
    profile = load_profile("pi5")
    peak, bandwidth = profile.compute.fp32.reached, profile.memory.reached
    roof, predicted = (line.get_ydata() for line in draw_roofline(profile).axes[0].lines)
    np.testing.assert_allclose(roof, np.minimum(peak, bandwidth * INTENSITY) / 1e9)
    ridge = int(np.argmin(np.abs(INTENSITY - peak / bandwidth)))
    assert predicted[ridge] / roof[ridge] == pytest.approx(0.5, rel=0.05)
    assert (predicted <= roof).all()


def test_a_calibrated_profile_has_a_line_a_kernel_class() -> None:
    rates = made_up(0, 4e6)
    profile = calibrated(rates, 16, 4)
    labels = [line.get_label() for line in draw_roofline(profile).axes[0].lines]
    assert labels == ["conv", "narrow", "odd", "odd pointwise", "depthwise", "odd depthwise", "matmul"]
    assert reached(profile, "conv")[-1] == pytest.approx(
        1 / (rates.operation[0] + rates.byte[0] / INTENSITY[-1]), rel=1e-3
    )
