"""What the server asks of the clients, and the clients of a simulation in one process."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cahfp_cli.errors import InputError, first_line
from cahfp_cli.federation.client import Reply, Task, Trainer, train_client
from cahfp_cli.federation.memory import Floats, Mask, limited
from cahfp_cli.federation.scoring import SIZED
from cahfp_cli.federation.setting import Setting
from cahfp_cli.federation.streams import Purpose, derived
from cahfp_cli.significance.measure import Measuring, measure, subset
from cahfp_cli.significance.registry import find_criterion


class Clients(Protocol):
    """Whoever is asked answers, or why it did not is said instead. Answers come in the order of the questions, and
    nothing in them has been looked at."""

    def train(self, setting: Setting, tasks: Iterable[Task]) -> Iterator[tuple[Task, Reply | str]]:
        """Let clients train what they are sent."""

    def score(
        self, setting: Setting, number: int, clients: Sequence[int], criterion: str
    ) -> Iterator[tuple[int, Floats | str]]:
        """Let clients score the global network, which the setting's network is in round `number`; (groups,) each."""

    def choose(
        self, setting: Setting, number: int, masks: Mapping[int, Mask], criterion: str, widths: str
    ) -> Iterator[tuple[int, Mask | str]]:
        """Let clients score it and choose their own masks, (groups,) each.

        Args: masks: what each of these clients keeps so far. widths: a name in `SIZED`.
        """


@dataclass(frozen=True)
class LocalClients:
    """One after the other in this process."""

    trainer: Trainer = train_client

    def train(self, setting: Setting, tasks: Iterable[Task]) -> Iterator[tuple[Task, Reply | str]]:
        for task in tasks:
            try:
                yield task, self.trainer(task)
            except InputError as error:
                yield task, first_line(error)

    def score(
        self, setting: Setting, number: int, clients: Sequence[int], criterion: str
    ) -> Iterator[tuple[int, Floats | str]]:
        for client in clients:
            try:
                yield client, score_client(setting, number, client, criterion)
            except InputError as error:
                yield client, first_line(error)

    def choose(
        self, setting: Setting, number: int, masks: Mapping[int, Mask], criterion: str, widths: str
    ) -> Iterator[tuple[int, Mask | str]]:
        for client, old in masks.items():
            try:
                yield client, choose_client(setting, number, client, old, criterion, widths)
            except InputError as error:
                yield client, first_line(error)


def choose_client(setting: Setting, number: int, client: int, old: Mask, criterion: str, widths: str) -> Mask:
    """What a client does when asked for its mask, boolean (groups,): it fits its device, and exchanges at most `churn`
    of the old one's groups; in the first round it exchanges as it likes.

    Raises: InputError: a score is not finite.
    """
    significance = score_client(setting, number, client, criterion)
    groups, device, table = setting.common.analysis.groups, setting.common.devices[client], setting.experiment.selection
    wanted = SIZED[widths](significance, groups, device.cost, device.budget)
    return limited(old, wanted, significance, groups.family, table.churn if number else 1.0)


def score_client(setting: Setting, number: int, client: int, criterion: str) -> Floats:
    """What a client does when asked for scores: it measures the setting's network on some of its own samples.

    Returns: float64 (groups,), rounded to float32 as it goes over the wire.
    Raises: InputError: a score is not finite.
    """
    seed = derived(Purpose.SCORING, setting.seed, number, client)
    own = setting.data_of(client)
    assert own is not None
    data = subset(own, setting.experiment.selection.samples, seed)
    how = Measuring(interactions=False, seed=seed)
    found = measure(setting.common.network, setting.common.analysis.groups, find_criterion(criterion), data, how)
    return found.significance.astype(np.float32).astype(np.float64)
