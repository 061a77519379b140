"""The server's side: `Clients` behind a Flower `Grid`.

Whatever a node sends, or if it sends nothing until the deadline, the round goes on without it and says why.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from cahfp_cli.errors import first_line
from cahfp_cli.federation.client import Reply, Task
from cahfp_cli.federation.experiment import LONGEST_PROFILE
from cahfp_cli.federation.flower.protocol import (
    ARRAYS,
    CHOOSE,
    CLIENT,
    DEVICE,
    EXAMPLES,
    HELLO,
    ID,
    LOSS,
    MASK,
    METRICS,
    PLAN,
    PROFILE,
    SCORE,
    SIGNIFICANCE,
    TRAIN,
    Plan,
    mask_bytes,
    mask_of,
)
from cahfp_cli.federation.flower.wire import packed, unpacked
from cahfp_cli.federation.memory import Floats, Mask
from cahfp_cli.federation.setting import Setting
from cahfp_cli.models.tensors import state_arrays
from cahfp_cli.pruning.submodel import trained_arrays

LOG = logging.getLogger("flwr")
LOOK = 0.2
"""Seconds between looks for nodes that have come."""
LONGEST = 200
"""Characters of what a node says went wrong."""


@dataclass
class FlowerClients:
    """deadline: seconds that a node has to answer. joining: seconds that the first question waits for all nodes.

    Which node is which client, and which device, is asked of each node once; of two nodes that say that they are the
    same client, the first stays; one that answered with an error is asked again in the next round. nodes, profiles: by
    client; the text of a profile, where the node sent one.
    """

    grid: Grid
    deadline: float
    joining: float
    nodes: dict[int, int] = field(default_factory=dict)
    profiles: dict[int, str] = field(default_factory=dict)
    met: set[int] = field(default_factory=set)
    waited: bool = False

    def train(self, setting: Setting, tasks: Iterable[Task]) -> Iterator[tuple[Task, Reply | str]]:
        sent: dict[int, Task] = {}

        def questions() -> Iterator[tuple[Plan, RecordDict]]:
            for task in tasks:
                sent[task.client] = task
                plan = plan_of(setting, task)
                yield plan, question(plan, packed(trained_arrays(task.model, task.index_map)))

        answers = self.ask(setting, f"train.{TRAIN}", questions())
        for client, answer in answers.items():
            yield sent[client], answer if isinstance(answer, str) else read_reply(answer, sent[client])

    def score(
        self, setting: Setting, number: int, clients: Sequence[int], criterion: str
    ) -> Iterator[tuple[int, Floats | str]]:
        if not clients:
            return
        network = packed(state_arrays(setting.common.network))
        plans = [Plan(setting.partition, setting.seed, number, c, "", criterion=criterion) for c in clients]
        answers = self.ask(setting, f"query.{SCORE}", ((plan, question(plan, network)) for plan in plans))
        most = np.dtype(np.float32).itemsize * setting.common.analysis.groups.count
        for client, answer in answers.items():
            yield client, answer if isinstance(answer, str) else read_scores(answer, most)

    def choose(
        self, setting: Setting, number: int, masks: Mapping[int, Mask], criterion: str, widths: str
    ) -> Iterator[tuple[int, Mask | str]]:
        if not masks:
            return
        network, groups = packed(state_arrays(setting.common.network)), setting.common.analysis.groups.count
        plans = [
            Plan(setting.partition, setting.seed, number, c, "", mask_bytes(old), criterion=criterion, widths=widths)
            for c, old in masks.items()
        ]
        answers = self.ask(setting, f"query.{CHOOSE}", ((plan, question(plan, network)) for plan in plans))
        for client, answer in answers.items():
            yield client, answer if isinstance(answer, str) else read_mask(answer, groups)

    def ask(
        self, setting: Setting, kind: str, questions: Iterable[tuple[Plan, RecordDict]]
    ) -> dict[int, RecordDict | str]:
        """What each client answers, by its number in the order of the questions, or why there is nothing."""
        plans: dict[int, Plan] = {}
        messages = []
        here = self.meet(setting.experiment.clients)
        for plan, content in questions:
            plans[plan.client] = plan
            if plan.client in here:
                messages.append(self.message(content, kind, here[plan.client], plan.number))
        replies = {m.metadata.src_node_id: m for m in self.exchange(messages)}
        answers: dict[int, RecordDict | str] = {}
        for client, plan in plans.items():
            if client not in here:
                answers[client] = "not connected"
            elif here[client] not in replies:
                answers[client] = f"no answer within {self.deadline:g} s"
            else:
                answers[client] = content_of(replies[here[client]], plan)
        return answers

    def meet(self, expected: int) -> Mapping[int, int]:
        """The nodes that are connected now, by client; only the first time waits until as many are as expected."""
        last = time.monotonic() + (0 if self.waited else self.joining)
        failed: set[int] = set()
        while True:
            present = set(self.grid.get_node_ids())
            self.met &= present
            new = present - self.met
            self.met |= new
            hello = [self.message(RecordDict(), f"query.{HELLO}", node, 0) for node in sorted(new)]
            for reply in self.exchange(hello):
                client = claimed(reply)
                if reply.has_error():
                    failed.add(reply.metadata.src_node_id)
                    LOG.warning("node %d says not who it is: %s", reply.metadata.src_node_id, reason_of(reply))
                elif client is not None and 0 <= client < expected and self.nodes.get(client) not in present:
                    self.nodes[client] = reply.metadata.src_node_id
                    self.profiles |= reported(reply, client)
            here = {client: node for client, node in self.nodes.items() if node in present}
            if len(here) >= expected or time.monotonic() >= last:
                self.waited = True
                self.met -= failed
                return here
            time.sleep(LOOK)

    def message(self, content: RecordDict, kind: str, node: int, number: int) -> Message:
        return Message(content, node, kind, ttl=self.deadline, group_id=str(number))

    def exchange(self, messages: Sequence[Message]) -> list[Message]:
        if not messages:
            return []
        return list(self.grid.send_and_receive(messages, timeout=self.deadline))


def plan_of(setting: Setting, task: Task) -> Plan:
    return Plan(
        setting.partition,
        setting.seed,
        task.number,
        task.client,
        task.index_map.checkpoint,
        mask=mask_bytes(task.mask),
        scaler=task.scaler,
    )


def question(plan: Plan, arrays: ArrayRecord) -> RecordDict:
    return RecordDict({PLAN: plan.record(), ARRAYS: arrays})


def claimed(reply: Message) -> int | None:
    """Which client a node says it is; None where it says nothing of use."""
    try:
        client = reply.content.metric_records[METRICS][CLIENT]
    except Exception:  # an error, or whatever a node sent
        return None
    return client if isinstance(client, int) else None


def reported(reply: Message, client: int) -> dict[int, str]:
    """The text of the client's profile, if its node sent one."""
    record = reply.content.get(DEVICE)
    text = record.get(PROFILE) if isinstance(record, ConfigRecord) else None
    return {client: text} if isinstance(text, str) and len(text) <= LONGEST_PROFILE else {}


def content_of(reply: Message, plan: Plan) -> RecordDict | str:
    """A reply to this plan, or why it is none."""
    if reply.has_error():
        return f"error: {reason_of(reply)}"
    record = reply.content.get(PLAN)
    if not isinstance(record, ConfigRecord) or record.get(ID) != plan.id:
        return "its reply is not to the plan that it was sent"
    return reply.content


def reason_of(reply: Message) -> str:
    """What a node says went wrong: one line of characters that can be printed."""
    lines = (line.strip() for line in (reply.error.reason or "").splitlines())
    first = next(filter(None, lines), "without a reason")[:LONGEST]
    return "".join(character if character.isprintable() else "?" for character in first)


def read_reply(content: RecordDict, task: Task) -> Reply | str:
    """What a client sent; the gate of the round looks at what it says."""
    most = sum(array.nbytes for array in trained_arrays(task.model, task.index_map).values())
    try:
        metrics: Any = content.metric_records[METRICS]  # whatever a client sent
        return Reply(unpacked(content.array_records[ARRAYS], most), metrics[EXAMPLES], metrics[LOSS])
    except Exception as error:  # whatever a client sent
        return f"its reply cannot be read: {first_line(error)[:LONGEST]}"


def read_scores(content: RecordDict, most: int) -> Floats | str:
    try:
        return np.asarray(unpacked(content.array_records[ARRAYS], most)[SIGNIFICANCE].astype(np.float64))
    except Exception as error:  # whatever a client sent
        return f"its scores cannot be read: {first_line(error)[:LONGEST]}"


def read_mask(content: RecordDict, groups: int) -> Mask | str:
    try:
        sent = unpacked(content.array_records[ARRAYS], -(-groups // 8))[MASK]
        return mask_of(sent.tobytes(), groups)
    except Exception as error:  # whatever a client sent
        return f"its mask cannot be read: {first_line(error)[:LONGEST]}"
