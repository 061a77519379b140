"""The fuzz of every day: each odd network through the commands, and some drawn options and damaged files.

`scripts/fuzz.py` does the same for hours, with everything drawn.
"""

import warnings
from random import Random

import pytest
import torch

from tests.support import fuzz
from tests.support.odd_networks import NETWORKS

CALIBRATED = ("--keep", 0.5, "--calibration", "DATA", "--samples", fuzz.SAMPLES, "--rounds", 2)
KEEPING_ALL = ("--keep", 1.0, "--selection", "independent")
WAYS = (fuzz.Options(), fuzz.Options(prune=CALIBRATED), fuzz.Options(prune=KEEPING_ALL))


@pytest.fixture(scope="module", autouse=True)
def quiet_and_alone(tmp_path_factory):
    """One thread, in an empty folder: what a drawn option writes lands there."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.chdir(tmp_path_factory.mktemp("current"))
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    return fuzz.good_files(tmp_path_factory.mktemp("fleet"), onnx=False)


@pytest.mark.parametrize(("number", "name"), enumerate(NETWORKS), ids=list(NETWORKS))
def test_odd_network_goes_through_every_command_or_is_refused_by_name(number, name, tmp_path):
    bench = fuzz.bench_of(name, tmp_path)
    faults = fuzz.through_every_command(bench, WAYS[number % len(WAYS)])
    assert not faults, "\n".join(faults)
    if not bench.odd.refused:
        assert not bench.refusals


def test_a_network_that_refuses_constants_is_traced_on_samples(tmp_path):
    bench = fuzz.bench_of("reads_the_end", tmp_path)
    faults = fuzz.through_every_command(bench, fuzz.Options(prune=CALIBRATED))
    assert not faults and not bench.refusals


def test_whole_numbers_have_a_least_and_a_largest_value():
    unbounded = [(name, o.words) for name, options in fuzz.commands().items() for o in options if not o.bounded]
    assert not unbounded


@pytest.mark.parametrize("seed", range(6))
def test_drawn_options_end_in_a_documented_code(seed, fleet, tmp_path):
    random, faults = Random(seed), []
    for number in range(12):
        faults += fuzz.with_options(fleet, random, tmp_path / str(number))
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("seed", range(6))
def test_damaged_files_are_refused_or_give_what_they_say(seed, fleet, tmp_path):
    random, faults = Random(seed), []
    for number in range(12):
        faults += fuzz.with_damage(fleet, random, tmp_path / str(number))
    assert not faults, "\n".join(faults)
