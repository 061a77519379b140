"""Masks chosen by scores: they fit, devices alike agree, and parts of masks lie inside them."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cahfp_cli.checkpoint.digest import content_digest
from cahfp_cli.federation.clients import LocalClients
from cahfp_cli.federation.gate import fault_of_mask
from cahfp_cli.federation.methods import METHODS
from cahfp_cli.federation.rounds import first_memory, situation_of, trained_mask
from cahfp_cli.federation.scoring import diminishing, even, layered, level, nested, renewed
from cahfp_cli.federation.setting import Setting, make_setting, prepare
from cahfp_cli.federation.simulation import simulate
from tests.support.experiments import PROVENANCE, experiment

DATA = {"train": "digits@train[0:300]", "test": "digits@test[0:100]"}


@cache
def small() -> Setting:
    return make_setting(prepare(experiment(), PROVENANCE), "iid", 0)


def random_scores(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).exponential(size=small().common.analysis.groups.count)


def test_worth_diminishes_and_a_whole_family_has_its_harmonic_share() -> None:
    family, significance = np.array([0, 1, 0, 0, 1]), np.array([1.0, 5.0, 3.0, 2.0, 7.0])
    # Family 0 has 6 in all, best first: groups 2, 3, 0; family 1 has 12: groups 4, 1.
    assert diminishing(significance, family).tolist() == [2.0, 6.0, 6.0, 3.0, 12.0]


@given(seed=st.integers(0, 10**6), cost=st.tuples(*[st.integers(1, 9)] * 3), share=st.floats(0.2, 0.9))
def test_layers_get_what_the_best_of_all_widths_would_give_them(
    seed: int, cost: tuple[int, int, int], share: float
) -> None:
    """Where a group costs the same whatever the widths are, spending on the best ratio first is known to come within
    one group of the best sum (the knapsack's greedy bound)."""
    random = np.random.default_rng(seed)
    sizes = (3, 4, 2)
    family, significance = np.repeat(np.arange(3), sizes), random.exponential(size=9)
    worth = diminishing(significance, family)
    order = [np.sort(worth[family == number])[::-1] for number in range(3)]
    limit = share * sum(size * each for size, each in zip(sizes, cost, strict=True))

    def value(widths: tuple[int, ...]) -> float:
        return float(sum(own[:width].sum() for own, width in zip(order, widths, strict=True)))

    fitting = [
        widths
        for widths in itertools.product(*(range(size + 1) for size in sizes))
        if sum(width * each for width, each in zip(widths, cost, strict=True)) <= limit
    ]
    best = max(map(value, fitting))
    ratio = worth / np.array(cost)[family]
    spent, found = 0.0, 0.0
    for group in np.argsort(-ratio, kind="stable"):
        if spent + cost[family[group]] <= limit:
            spent += cost[family[group]]
            found += float(worth[group])
    assert best - worth.max() - 1e-9 <= found <= best + 1e-9


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 50))
def test_masks_by_layer_fit_their_device_and_leave_no_group_out_that_fits(seed: int) -> None:
    common = small().common
    groups, significance = common.analysis.groups, random_scores(seed)
    for device in (common.devices[2], common.devices[4]):
        kept = layered(significance, groups, device.cost, device.budget)
        limit = device.budget.params.value * float(device.cost.full.params)
        widths = groups.widths(kept)
        assert float(device.cost.cost(widths).params) <= limit
        assert (widths >= groups.narrowest).all()
        for number in np.flatnonzero(widths < device.cost.full_widths):
            wider = widths.copy()
            wider[number] += 1
            assert float(device.cost.cost(wider).params) > limit
        for number in range(len(widths)):  # the most significant ones of each family
            own = groups.family == number
            if (kept & own).any() and (~kept & own).any():
                assert significance[kept & own].min() >= significance[~kept & own].max()


def test_before_scores_layers_that_cost_less_keep_more() -> None:
    common = small().common
    device, groups = common.devices[4], common.analysis.groups
    by_layer = groups.widths(layered(level(groups), groups, device.cost, device.budget)) / device.cost.full_widths
    alike = groups.widths(even(level(groups), groups, device.cost, device.budget)) / device.cost.full_widths
    assert np.ptp(by_layer) > np.ptp(alike)
    assert by_layer[0] == 1.0  # the first layer costs next to nothing
    assert by_layer[0] > by_layer[-1]


@given(seed=st.integers(0, 10**6))
def test_a_part_of_a_mask_is_inside_it_and_has_at_most_the_other_widths(seed: int) -> None:
    random = np.random.default_rng(seed)
    family = np.repeat(np.arange(3), (5, 9, 14))
    own, other = random.random(28) < 0.7, random.random(28) < 0.4
    found = nested(own, other, random.random(28), family)
    assert not (found & ~own).any()
    for number in range(3):
        among = family == number
        assert found[among].sum() == min(own[among].sum(), other[among].sum())
        if (found & ~other & among).any():  # others only once all that both have are in
            assert (found & among)[own & other & among].all()


def test_a_mask_inside_another_is_its_own_part() -> None:
    family = np.repeat(np.arange(2), (4, 6))
    own = np.array([1, 1, 1, 0, 1, 1, 0, 1, 1, 0], bool)
    other = own & np.array([1, 0, 1, 1, 0, 1, 1, 1, 1, 1], bool)
    assert (nested(own, other, np.arange(10.0), family) == other).all()
    assert (nested(other, own, np.arange(10.0), family) == other).all()


def test_devices_alike_with_shared_scores_keep_the_same_groups() -> None:
    setting = small()
    devices, groups = setting.common.devices, setting.common.analysis.groups
    memory = first_memory(setting, METHODS["cahfp"])
    for client in (0, 3, 5):
        memory = memory.with_score(client, random_scores(client), 2, 0.5)
    shared = renewed(memory, devices, groups, 1.0, 0.3, layered)
    for first, second in ((0, 1), (2, 3), (4, 5)):
        assert (shared.masks[first] == shared.masks[second]).all()
    own = renewed(memory, devices, groups, 0.0, 0.3, layered)
    assert (own.masks[2] != own.masks[3]).any()
    unscored = first_memory(setting, METHODS["cahfp"])
    assert renewed(unscored, devices, groups, 1.0, 0.3, layered) is unscored


def test_a_nesting_client_trains_half_of_the_time_what_the_smallest_device_has() -> None:
    setting = small()
    memory = first_memory(setting, METHODS["cahfp"])
    smallest, nested_in = memory.masks[4], []
    for client in (0, 2):
        for number in range(60):
            situation = situation_of(setting, number, {}, memory)
            mask = trained_mask(situation, setting, METHODS["cahfp"], client)
            nested_in.append((mask == smallest).all())
            assert nested_in[-1] or (mask == memory.masks[client]).all()
            plain = trained_mask(situation, setting, METHODS["cahfp-apart"], client)
            assert (plain == memory.masks[client]).all()
    assert 40 < sum(nested_in) < 80
    assert (trained_mask(situation_of(setting, 0, {}, memory), setting, METHODS["cahfp"], 4) == smallest).all()


BY_CLIENT = {"by": "client", "rescore_every": 1, "samples": 16}


def test_clients_choose_masks_that_fit_from_scores_that_stay_with_them(tmp_path: Path) -> None:
    sent: list[tuple[int, np.ndarray, np.ndarray | str]] = []

    class Watched(LocalClients):
        def score(
            self, setting: Setting, number: int, clients: Sequence[int], criterion: str
        ) -> Iterator[tuple[int, np.ndarray | str]]:
            raise AssertionError("no scores are to be sent")

        def choose(
            self, setting: Setting, number: int, masks: Mapping[int, np.ndarray], criterion: str, widths: str
        ) -> Iterator[tuple[int, np.ndarray | str]]:
            for client, mask in super().choose(setting, number, masks, criterion, widths):
                sent.append((client, masks[client], mask))
                yield client, mask

    asked = experiment(rounds=4, selection={**BY_CLIENT, "churn": 0.2})
    (run,) = simulate(asked, tmp_path / "out", PROVENANCE, fleet=Watched())
    setting = small()
    devices, groups = setting.common.devices, setting.common.analysis.groups
    assert len(sent) == 3 * 4 and all(row["failed"] is None for row in run.rows)
    changed = 0
    for client, old, mask in sent:
        assert fault_of_mask(mask, groups, devices[client], even=True) is None
        entering = np.bincount(groups.family[mask & ~old], minlength=len(groups.names))
        assert (entering <= 0.2 * groups.widths(mask)).all()
        changed += int(entering.sum())
    assert changed > 0
    assert (
        len({mask.tobytes() for client, _, mask in sent if client in (2, 3)}) > 1
    )  # devices alike choose for themselves


def first_of_each_layer(mask: np.ndarray) -> np.ndarray:
    family = small().common.analysis.groups.family
    kept = np.zeros_like(mask)
    kept[[np.flatnonzero(mask & (family == number))[0] for number in np.unique(family)]] = True
    return kept


def test_a_mask_that_its_device_may_not_have_is_as_if_it_had_not_come(tmp_path: Path) -> None:
    setting = small()
    devices, groups = setting.common.devices, setting.common.analysis.groups
    sound = first_memory(setting, METHODS["cahfp"]).masks[5]
    assert fault_of_mask(sound, groups, devices[5], even=True) is None
    bad = {
        "all": np.ones_like(sound),
        "none": np.zeros_like(sound),
        "narrow": first_of_each_layer(sound),
        "short": sound[1:],
        "numbers": sound.astype(np.int64),
        "square": np.stack([sound, sound]),
    }
    digests = set()
    for name, mask in {"silent": None, **bad}.items():
        assert mask is None or fault_of_mask(mask, groups, devices[5], even=True) is not None

        class Choosing(LocalClients):
            def choose(
                self, setting: Setting, number: int, masks: Mapping[int, np.ndarray], criterion: str, widths: str
            ) -> Iterator[tuple[int, np.ndarray | str]]:
                for client, found in super().choose(setting, number, masks, criterion, widths):
                    yield client, found if client != 5 else "silent" if mask is None else mask  # noqa: B023

        asked = experiment(rounds=2, clients_per_round=6, selection=BY_CLIENT)
        (run,) = simulate(asked, tmp_path / name, PROVENANCE, fleet=Choosing())
        assert list(run.rows[1]["unscored"]) == ["5"]
        (final,) = (tmp_path / name).rglob("final.safetensors")
        digests.add(content_digest(final))
    assert len(digests) == 1


def test_clients_score_only_in_every_so_many_rounds(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    class Watched(LocalClients):
        def score(
            self, setting: Setting, number: int, clients: Sequence[int], criterion: str
        ) -> Iterator[tuple[int, np.ndarray | str]]:
            asked.append((number, len(clients)))
            return super().score(setting, number, clients, criterion)

    table = {"rescore_every": 2, "samples": 16}
    simulate(experiment(rounds=5, selection=table), tmp_path / "cold", PROVENANCE, fleet=Watched())
    assert asked == [(2, 4), (4, 4)]  # nobody an untrained network
    asked.clear()
    warm = {"data": {**DATA, "public": "digits@train[300:400]"}, "start": {"public_epochs": 1}}
    simulate(experiment(rounds=3, selection=table, **warm), tmp_path / "warm", PROVENANCE, fleet=Watched())
    assert asked == [(0, 4), (2, 4)]
