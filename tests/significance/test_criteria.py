"""Each criterion against an independent computation; what leads to it; the scores file."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from cahfp_cli.checkpoint.metadata import Provenance
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.coupling.analysis import analyse
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.models.checkpoint_io import state_arrays
from cahfp_cli.significance.gates import GateStatistics
from cahfp_cli.significance.measure import measure, subset
from cahfp_cli.significance.registry import CRITERIA, Evidence, find_criterion
from cahfp_cli.significance.scores import Scores, ScoresMetadata, read_scores, write_scores

PROVENANCE = Provenance(tool="cahfp 0", command="test")
DIGEST = "0123456789abcdef" * 4


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    return model, analyse(model, (2, 4, 4)).groups


def evidence(network, seed=0):
    model, groups = network
    numbers = np.random.default_rng(5).normal(size=(4, groups.count))
    return Evidence(groups, state_arrays(model), GateStatistics(*numbers, 7, 0.5), seed)


def weights_of(network, channel):
    """All weights of one channel: its filter, and its 2 x 2 pixels in the linear layer."""
    conv, linear = (network[0].state_dict()[name].double() for name in ("0.weight", "4.weight"))
    return torch.cat([conv[channel].flatten(), linear[:, 4 * channel : 4 * channel + 4].flatten()])


EXPECTED = {
    "l1": lambda network, channel: float(weights_of(network, channel).abs().sum()),
    "l2": lambda network, channel: float(weights_of(network, channel).norm()),
    "gate-ggn": lambda network, channel: evidence(network).gates.curvature[channel] / 2,
    "gate-fisher": lambda network, channel: evidence(network).gates.gradient_square[channel] / 2,
    "gate-taylor": lambda network, channel: abs(evidence(network).gates.gradient[channel]),
    "random": lambda network, channel: np.random.default_rng(0).random(4)[channel],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_criterion_equals_an_independent_computation(network, name):
    found = find_criterion(name).function(evidence(network))
    assert found.dtype == np.float64
    order = network[1].labels["0.weight"][0]
    assert order.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(found, [EXPECTED[name](network, channel) for channel in order], rtol=1e-12)


def test_every_criterion_has_a_test():
    find_criterion("l1")
    assert set(EXPECTED) == set(CRITERIA)


def test_an_unknown_criterion_is_answered_with_the_known_ones():
    with pytest.raises(UsageError, match="gate-fisher, gate-ggn, gate-taylor, l1, l2, random"):
        find_criterion("magnitude")


def calibration(samples=6):
    rng = np.random.default_rng(1)
    x = rng.random((samples, 2, 4, 4), dtype=np.float32)
    return Dataset(x, rng.integers(0, 3, samples), 3, "noise")


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("draws", [None, 2])
def test_the_same_seed_gives_the_same_bits(network, name, draws):
    criterion = find_criterion(name)
    runs = [
        measure(network[0], network[1], criterion, calibration(), 4, draws, 3, lambda done, total: None)
        for _ in range(2)
    ]
    assert np.array_equal(runs[0].significance, runs[1].significance)
    assert (runs[0].gates is None) == (not criterion.needs_gates)


def test_progress_ends_at_the_number_of_samples(network):
    seen = []
    measure(*network, find_criterion("gate-ggn"), calibration(), 4, None, 0, lambda *step: seen.append(step))
    assert seen == [(4, 6), (6, 6)]


def test_a_score_that_is_not_finite_is_refused(network):
    with torch.no_grad():
        network[0][0].weight[1, 0, 0, 0] = torch.inf
    with pytest.raises(InputError, match="l1 gives NaN or Inf for 1 groups"):
        measure(*network, find_criterion("l1"), None, 4, None, 0, lambda done, total: None)


def test_a_subset_is_drawn_once_each_in_order_by_seed():
    data = Dataset(np.arange(20, dtype=np.float32)[:, None], np.arange(20), 20, "numbers")
    chosen = subset(data, 8, 1)
    assert len(chosen) == 8
    assert np.array_equal(chosen.x[:, 0], chosen.y)
    assert (np.diff(chosen.y) > 0).all()
    assert np.array_equal(chosen.y, subset(data, 8, 1).y)
    assert not np.array_equal(chosen.y, subset(data, 8, 2).y)
    assert subset(data, 20, 1) is data


# --- the scores file ------------------------------------------------------------------------------------------------


def scores(**changes):
    metadata = {"checkpoint": DIGEST, "criterion": "gate-ggn", "samples": 9, "loss": 0.1, "families": ("a", "b")}
    fields = {
        "metadata": ScoresMetadata(provenance=PROVENANCE, **metadata),
        "significance": np.array([0.5, math.pi, 0.0]),
        "family": np.array([0, 1, 1]),
        "sizes": np.array([3, 4, 4]),
        "gradient": np.array([-1.0, 0.0, 1e-300]),
        "curvature": np.array([1.0, 2.0, 3.0]),
    }
    return Scores(**(fields | changes))


ARRAYS = ("significance", "family", "sizes", "gradient", "curvature")


@pytest.mark.parametrize("gates", [True, False])
def test_scores_survive_the_file_and_equal_ones_give_equal_bytes(tmp_path, gates):
    written = scores() if gates else scores(gradient=None, curvature=None)
    write_scores(tmp_path / "a", written)
    write_scores(tmp_path / "b", written)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = read_scores(tmp_path / "a")
    assert read.metadata == written.metadata
    for name in ARRAYS:
        expected, found = getattr(written, name), getattr(read, name)
        assert (found is None) == (expected is None)
        assert found is None or (found.dtype == expected.dtype and np.array_equal(found, expected))


FAULTS = {
    "NaN": {"significance": np.array([0.5, np.nan, 0.0])},
    "infinite curvature": {"curvature": np.array([1.0, np.inf, 0.0])},
    "too short": {"sizes": np.array([3, 4])},
    "two axes": {"significance": np.zeros((3, 1))},
    "another type": {"significance": np.zeros(3, np.float32)},
    "family out of range": {"family": np.array([0, 1, 2])},
    "negative family": {"family": np.array([0, -1, 1])},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_scores_are_refused_by_name_of_the_file(tmp_path, fault):
    write_scores(tmp_path / "scores", scores(**FAULTS[fault]))
    with pytest.raises(InputError, match="cahfp score") as error:
        read_scores(tmp_path / "scores")
    assert str(error.value).startswith(f"{tmp_path / 'scores'}: ")


@pytest.mark.parametrize("change", ["missing", "extra", "no metadata", "other metadata"])
def test_files_that_are_no_scores_are_refused(tmp_path, change):
    write_scores(tmp_path / "good", scores())
    with open_safetensors(tmp_path / "good") as file:
        arrays = {name: file.read(name) for name in file.tensors}
        metadata = dict(file.metadata)
    if change == "missing":
        del arrays["family"]
    if change == "extra":
        arrays["more"] = np.zeros(3)
    if change == "no metadata":
        metadata = {}
    if change == "other metadata":
        metadata["cahfp"] = json.dumps(json.loads(metadata["cahfp"]) | {"format": "cahfp.index_map/1"})
    save_arrays(tmp_path / "bad", arrays, metadata)
    with pytest.raises(InputError, match="bad"):
        read_scores(tmp_path / "bad")


def test_a_scores_file_cut_short_anywhere_or_with_a_flipped_header_is_refused(tmp_path):
    write_scores(tmp_path / "good", scores())
    whole = (tmp_path / "good").read_bytes()
    for length in [0, 7, 8, 40, len(whole) // 2, len(whole) - 1]:
        (tmp_path / "bad").write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_scores(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(whole[:9] + b"\x00" + whole[10:])
    with pytest.raises(InputError):
        read_scores(tmp_path / "bad")
