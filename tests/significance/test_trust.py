"""What `score` says of its own scores: by hand, against networks that were cut, and through the scores file."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, rankdata
from torch import nn

from cahfp_cli.checkpoint.metadata import Provenance
from cahfp_cli.coupling.analysis import analyse, cut
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.errors import InputError
from cahfp_cli.significance.measure import hold_out, split
from cahfp_cli.significance.scores import Scores, ScoresMetadata, TrustRecord, read_scores, write_scores
from cahfp_cli.significance.statistics import gate_statistics
from cahfp_cli.significance.trust import (
    LARGEST_RATIO,
    LEAST_RELIABILITY,
    LEAST_SAMPLES,
    SHARES,
    RemovedSet,
    Trust,
    reliability,
    trust,
    without_least,
)

HIDDEN, CLASSES, SAMPLES = 40, 4, 64


@pytest.fixture(scope="module")
def network():
    """A network whose logits are linear in its gates, its analysis, its statistics and samples held out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).double().eval()
    random = np.random.default_rng(0)
    x, held_out = random.normal(size=(2, SAMPLES, 6))
    analysis = analyse(model, (6,), torch.float64)
    return model, analysis, gate_statistics(model, analysis.groups, x, np.zeros(SAMPLES, np.int64)), held_out


# --- reliability -----------------------------------------------------------------------------------------------------


def test_halves_that_are_the_same_or_rank_the_same_are_wholly_reliable():
    half = np.random.default_rng(0).random(50)
    assert reliability(np.stack([half, half])) == pytest.approx(1, abs=1e-12)
    assert reliability(np.stack([half, np.exp(9 * half)])) == pytest.approx(1, abs=1e-12)


def test_unrelated_halves_are_hardly_reliable_and_opposite_ones_not_at_all():
    random = np.random.default_rng(0)
    found = [reliability(random.random((2, 400))) for _ in range(50)]
    assert min(found) == 0 and max(found) < 0.3 and np.mean(found) < 0.1
    half = random.random(50)
    assert reliability(np.stack([half, -half])) == 0


def test_reliability_is_spearman_and_brown_by_hand():
    halves = np.array([[1.0, 2, 3, 4, 5], [2.0, 1, 3, 5, 4]])
    rho = 1 - 6 * (1 + 1 + 0 + 1 + 1) / (5 * 24)
    assert reliability(halves) == pytest.approx(2 * rho / (1 + rho), rel=1e-12)
    tied = np.array([[1.0, 1, 3, 4, 9, 9], [2.0, 1, 3, 3, 4, 8]])
    rho = np.corrcoef(rankdata(tied[0]), rankdata(tied[1]))[0, 1]
    assert reliability(tied) == pytest.approx(2 * rho / (1 + rho), rel=1e-12)
    assert kendalltau(*tied).statistic != pytest.approx(rho, abs=0.01)


@pytest.mark.parametrize("halves", [np.ones((2, 5)), [[1.0, 1, 1], [1.0, 2, 3]], np.ones((2, 1)), np.ones((2, 0))])
def test_halves_that_rank_nothing_are_not_reliable(halves):
    assert reliability(np.array(halves)) == 0.0


def test_twice_the_samples_agree_as_much_as_the_halves_predict():
    """The formula's claim, on scores that are a truth and independent noise: rho of two whole samples."""
    random = np.random.default_rng(0)
    truth = random.normal(size=4000)
    halves, others = truth + random.normal(size=(2, 4000)), truth + random.normal(size=(2, 4000))
    whole = [half.mean(0) for half in (halves, others)]
    agreement = np.corrcoef(rankdata(whole[0]), rankdata(whole[1]))[0, 1]
    assert reliability(halves) == pytest.approx(agreement, abs=0.02)


# --- effective samples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contributions", "expected"),
    [([0.3] * 7, 7), ([0, 0, 5.0, 0], 1), ([1.0, 1, 0, 0], 2), ([3.0, 1], 16 / 10), ([0.0, 0], 0), ([1e9, 1, 1], 1)],
)
def test_effective_samples_count_how_many_alike_would_do(network, contributions, expected):
    model, analysis, statistics, _ = network
    changed = replace(statistics, contributions=np.array(contributions))
    assert trust(model, analysis, changed.curvature, changed, None, 64).effective_samples == pytest.approx(
        expected, rel=1e-6
    )


# --- sets ------------------------------------------------------------------------------------------------------------


def test_sets_are_predicted_by_the_quadratic_form_and_measured_on_what_was_held_out(network):
    model, analysis, statistics, held_out = network
    judged = trust(model, analysis, statistics.curvature, statistics, held_out, 16)
    ggn = statistics.interactions.astype(np.float64).T @ statistics.interactions.astype(np.float64)
    assert [one.share for one in judged.sets] == list(SHARES) == [0.05, 0.1, 0.2]
    for one in judged.sets:
        removed = np.argsort(statistics.curvature)[: int(one.share * HIDDEN)]
        d = np.isin(np.arange(HIDDEN), removed).astype(float)
        assert one.groups == len(removed)
        assert one.predicted == pytest.approx(d @ ggn @ d / 2, rel=1e-9)
        compact = cut(model, analysis, d == 0)[0]
        with torch.no_grad():
            p, q = (net(torch.from_numpy(held_out)).log_softmax(1) for net in (model, compact))
        assert one.measured == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-9)
    assert [one.predicted for one in judged.sets] == sorted(one.predicted for one in judged.sets)
    assert judged.sets[0].measured == pytest.approx(judged.sets[0].predicted, rel=0.5)
    assert judged.reliability == reliability(statistics.halves) > 0.5


@pytest.mark.parametrize("share", SHARES)
def test_sets_are_the_least_significant_of_each_family_and_leave_what_must_stay(network, share):
    torch.manual_seed(1)
    layers = [nn.Linear(5, 23), nn.Tanh(), nn.Linear(23, 9), nn.Tanh(), nn.Linear(9, 2), nn.Tanh(), nn.Linear(2, 3)]
    groups = analyse(nn.Sequential(*layers), (5,)).groups
    groups = replace(groups, narrowest=np.array([22, 1, 1]))
    significance = np.random.default_rng(2).random(groups.count)
    kept = without_least(groups, significance, share)
    for family, narrowest in enumerate(groups.narrowest):
        members = np.flatnonzero(groups.family == family)
        gone = members[~kept[members]]
        assert len(gone) == min(int(share * len(members)), len(members) - narrowest)
        if len(gone):
            assert significance[gone].max() <= significance[members[kept[members]]].min()


def test_nothing_is_put_to_the_test_without_held_out_samples_or_interactions_or_in_tiny_layers(network):
    model, analysis, statistics, held_out = network
    assert trust(model, analysis, statistics.curvature, statistics, None, 64).sets == ()
    assert trust(model, analysis, statistics.curvature, replace(statistics, interactions=None), held_out, 64).sets == ()
    small = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, CLASSES)).double().eval()
    own = analyse(small, (6,), torch.float64)
    found = gate_statistics(small, own.groups, held_out, np.zeros(SAMPLES, np.int64))
    assert [(one.share, one.groups) for one in trust(small, own, found.curvature, found, held_out, 64).sets] == [
        (0.1, 1),
        (0.2, 2),
    ]


# --- warnings --------------------------------------------------------------------------------------------------------


def judged(measured=1.0, predicted=1.0, **changes):
    sets = (RemovedSet(0.05, 3, predicted, measured), RemovedSet(0.1, 6, 1.0, 100.0))
    return Trust(**({"reliability": 1.0, "effective_samples": 99.0, "sets": sets} | changes))


def test_there_is_no_warning_at_the_limits_and_one_for_each_just_beyond():
    assert (LEAST_RELIABILITY, LEAST_SAMPLES, LARGEST_RATIO) == (0.9, 10.0, 3.0)
    just = 1e-3
    assert judged().warnings() == judged(sets=()).warnings() == []
    assert judged(reliability=0.9).warnings() == judged(effective_samples=10.0).warnings() == []
    assert len(judged(reliability=0.9 - just).warnings()) == 1
    assert "reliability 0.90" in judged(reliability=0.9 - just).warnings()[0]
    assert "as much as 10 alike" in judged(effective_samples=10 - just).warnings()[0]
    for ratio in (3 - just, 1 / 3 + just):
        assert judged(measured=ratio).warnings() == []
    for ratio, text in ((3 + just, "3.0"), (1 / 3 - just, "0.3"), (20, "20.0")):
        (warning,) = judged(measured=ratio).warnings()
        assert warning.startswith(f"removing 3 groups changes predictions {text} times as much")
    poor = judged(measured=9.0, reliability=0.2, effective_samples=1.0)
    assert len(poor.warnings()) == 3


def test_two_divergences_that_vanish_agree():
    assert judged(measured=0.0, predicted=0.0).warnings() == []
    assert judged(measured=1e-7, predicted=0.0).warnings() == []
    assert len(judged(measured=1e-4, predicted=0.0).warnings()) == 1


def test_a_network_at_chance_is_named_and_nothing_else_is_said_of_its_scores():
    poor = {"reliability": 0.2, "effective_samples": 1.0, "samples": 100}
    (warning,) = judged(measured=9.0, accuracy=0.1, chance=0.1, **poor).warnings()
    assert "chance level" in warning and "accuracy 10.0%" in warning and "train it first" in warning
    error = (0.1 * 0.9 / 100) ** 0.5
    for accuracy, at_chance in ((0.1 + 2 * error - 1e-6, True), (0.1 + 2 * error + 1e-6, False), (0.0, True)):
        found = judged(accuracy=accuracy, chance=0.1, samples=100)
        assert found.at_chance == at_chance == bool(found.warnings())
    assert not judged(accuracy=None, chance=None, samples=100).at_chance


def test_a_network_certain_of_its_samples_is_named_and_other_samples_are_advised():
    certain = {"samples": 256, "certainty": 0.999}
    (warning,) = judged(effective_samples=5.0, **certain).warnings()
    assert "certain" in warning and "as much as 5 alike of 256" in warning and "not trained on" in warning
    assert "more --samples" not in " ".join(judged(effective_samples=5.0, reliability=0.5, **certain).warnings())
    assert judged(effective_samples=64.0, **certain).warnings() == []
    assert "more --samples" in judged(effective_samples=5.0, samples=256, certainty=0.9).warnings()[0]


def test_statistics_tell_accuracy_chance_and_certainty_of_the_network(network):
    model, analysis, _, x = network
    y = np.random.default_rng(3).integers(0, CLASSES, len(x))
    with torch.no_grad():
        p = model(torch.from_numpy(x)).softmax(1).numpy()
    for how in ({}, {"draws": 2}, {"top": 2}):
        found = gate_statistics(model, analysis.groups, x, y, batch_size=7, **how)
        assert found.accuracy == (p.argmax(1) == y).mean()
        assert found.chance == np.bincount(y).max() / len(y)
        assert found.certainty == pytest.approx(p.max(1).mean())
    placeholders = gate_statistics(model, analysis.groups, x, np.zeros(len(x), np.int64))
    assert placeholders.accuracy is None and placeholders.chance is None


# --- the data and the file -------------------------------------------------------------------------------------------


def numbers(count):
    return Dataset(np.arange(count, dtype=np.float32)[:, None], np.arange(count), count, "numbers")


def test_what_is_held_out_is_drawn_from_the_rest_and_does_not_change_the_first_part():
    data = numbers(20)
    first, others = split(data, 8, 5, 1)
    assert len(first) == 8 and len(others) == 5
    assert not set(first.y) & set(others.y)
    assert (np.diff(others.y) > 0).all() and np.array_equal(others.x[:, 0], others.y)
    again, none = split(data, 8, 0, 1)
    assert np.array_equal(again.y, first.y) and none is None
    assert len(split(data, 8, 100, 1)[1]) == 12
    assert split(data, 20, 5, 1)[1] is None and len(split(data, 50, 5, 1)[0]) == 20
    assert np.array_equal(split(data, 8, 5, 1)[1].y, others.y)
    assert not np.array_equal(split(data, 8, 5, 2)[1].y, others.y)


@pytest.mark.parametrize(
    ("count", "asked", "fitted", "others"),
    [(100, 40, 40, 10), (100, 90, 80, 20), (100, 500, 80, 20), (4, 9, 4, 0), (50, 6, 6, 2)],
)
def test_a_fifth_is_held_out_of_what_is_asked_for_or_there(count, asked, fitted, others):
    data = numbers(count)
    fit, judge = hold_out(data, asked, 0)
    assert len(fit) == fitted and (0 if judge is None else len(judge)) == others
    assert judge is None or not set(fit.y) & set(judge.y)
    if asked == fitted:
        assert np.array_equal(fit.y, split(data, asked, 0, 0)[0].y)


@pytest.mark.parametrize("held_out", [True, False])
def test_the_scores_file_keeps_trust_interactions_and_the_error_of_the_gradient(tmp_path, network, held_out):
    model, analysis, statistics, others = network
    found = trust(model, analysis, statistics.curvature, statistics, others if held_out else None, 64)
    scores = Scores(
        ScoresMetadata(
            checkpoint="0" * 64,
            criterion="gate-ggn",
            samples=SAMPLES,
            trust=TrustRecord.model_validate(asdict(found)),
            families=analysis.groups.names,
            provenance=Provenance(tool="cahfp 0", command="test"),
        ),
        statistics.curvature / 2,
        analysis.groups.family,
        analysis.groups.sizes(),
        gradient=statistics.gradient,
        gradient_error=statistics.gradient_error,
        interactions=statistics.interactions,
    )
    write_scores(tmp_path / "scores", scores)
    read = read_scores(tmp_path / "scores")
    assert read.metadata == scores.metadata
    assert read.metadata.trust.model_dump() == asdict(found) | {"sets": tuple(map(asdict, found.sets))}
    assert len(read.metadata.trust.sets) == (3 if held_out else 0)
    for name in ("gradient_error", "interactions"):
        assert getattr(read, name).tobytes() == getattr(scores, name).tobytes()
    for fault in (np.zeros((2, HIDDEN + 1), np.float32), np.zeros(HIDDEN, np.float32), np.zeros((2, HIDDEN, 2), "f4")):
        write_scores(tmp_path / "bad", replace(scores, interactions=fault))
        with pytest.raises(InputError, match="'interactions' has the wrong shape or type"):
            read_scores(tmp_path / "bad")
    for fault in (np.full((2, HIDDEN), np.nan, np.float32), np.full((2, HIDDEN), -np.inf, np.float32)):
        write_scores(tmp_path / "bad", replace(scores, interactions=fault))
        with pytest.raises(InputError, match="interactions holds NaN or Inf"):
            read_scores(tmp_path / "bad")
    write_scores(tmp_path / "bad", replace(scores, interactions=statistics.interactions.astype(np.float64)))
    with pytest.raises(InputError, match="'interactions' has the wrong shape or type"):
        read_scores(tmp_path / "bad")
