"""A Flower `Grid` in this process: nodes answer one after the other when they are asked. Needs no Ray."""

from collections.abc import Callable, Iterable, Mapping
from itertools import count

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

FIRST_NODE = 1000
"""So that no number of a node can pass for that of a client."""


class InProcessGrid(Grid):
    """change: what becomes of a client's reply on its way, None if it never comes. configs: of nodes, by client.
    messages: all that were sent."""

    def __init__(
        self,
        app: ClientApp,
        clients: int,
        change: Callable[[int, Message], Message | None] = lambda client, reply: reply,
        configs: Mapping[int, dict[str, str]] | None = None,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.app, self.change, self.configs, self.numbers = app, change, configs or {}, count()
        self.nodes = {FIRST_NODE + client: client for client in range(clients)}
        self.messages: list[tuple[int, Message]] = []

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(  # the abstract class wants it
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return [reply for message in messages if (reply := self.answer(message)) is not None]

    def answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        client = self.nodes[node]
        message.metadata.__dict__["_message_id"] = str(next(self.numbers))
        self.messages.append((client, message))
        context = Context(1, node, {"partition-id": client, **self.configs.get(client, {})}, RecordDict(), {})
        try:
            reply = self.app(message, context)
        except Exception as error:
            reply = Message(Error(0, repr(error)), reply_to=message)
        return self.change(client, reply)
