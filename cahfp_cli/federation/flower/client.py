"""The client's app: it trains the submodel, or scores the network, that a message holds, on its own data.

A client trusts no architecture that it is sent: it knows the experiment, makes the network itself, and cuts it by the
mask of the plan; the message must have the tensors that then are missing, of exactly those shapes.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from cahfp_cli.checkpoint.dtypes import DTYPES, Array
from cahfp_cli.checkpoint.metadata import Provenance
from cahfp_cli.device.catalogue import profile_path
from cahfp_cli.errors import CahfpError, InputError, first_line
from cahfp_cli.federation.client import Task, train_client
from cahfp_cli.federation.clients import choose_client, score_client
from cahfp_cli.federation.devices import REPORTED
from cahfp_cli.federation.experiment import Experiment
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
    mask_of,
    read_plan,
)
from cahfp_cli.federation.flower.wire import packed, unpacked
from cahfp_cli.federation.rounds import index_map_of, make_task
from cahfp_cli.federation.setting import Common, Setting, make_setting, prepare_client
from cahfp_cli.models.tensors import load_state, state_arrays, to_tensor
from cahfp_cli.running.device import use_threads

CLIENT_KEYS = ("client", "partition-id")
"""Where a node's own configuration says which client it is; the second is what Flower's simulation sets."""
DATA_KEY = "data"
NO_ANSWER = 0
Handler = Callable[[Message, Context], Message]


def make_client_app(experiment: Callable[[Context], str], threads: int | None = None) -> ClientApp:
    """An app whose every node is one client of an experiment.

    Args: experiment: gives the experiment as JSON, and is called for every message. A node's own data is what its
        configuration says (`data`).
    """

    def answering(answer: Callable[[Setting, Plan, RecordDict], RecordDict]) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            use_threads(threads)
            try:
                plan = read_plan(message.content.config_records[PLAN])
                if plan.client != client_of(context):
                    raise InputError(f"this is client {client_of(context)}, not {plan.client}.")
                own = context.node_config.get(DATA_KEY)
                text, own = for_node(experiment(context), context), None if own is None else str(own)
                found = answer(setting_of(text, own, plan.partition, plan.seed), plan, message.content)
            except CahfpError as error:
                return Message(Error(NO_ANSWER, first_line(error)), reply_to=message)
            found[PLAN] = ConfigRecord({ID: plan.id})
            return Message(found, reply_to=message)

        return handle

    app = ClientApp()
    app.query(HELLO)(hello)
    app.train(TRAIN)(answering(answer_train))
    app.query(SCORE)(answering(answer_score))
    app.query(CHOOSE)(answering(answer_choose))
    return app


def hello(message: Message, context: Context) -> Message:
    """Say which client this node is, and which device."""
    content = RecordDict({METRICS: MetricRecord({CLIENT: client_of(context)})})
    text = profile_text(context)
    if text is not None:
        content[DEVICE] = ConfigRecord({PROFILE: text})
    return Message(content, reply_to=message)


def profile_text(context: Context) -> str | None:
    """Of the profile that the node's configuration names, if it does. Raises: InputError, UsageError: there is none."""
    name = context.node_config.get(PROFILE)
    return None if name is None else profile_path(str(name)).read_text(encoding="utf-8")


def client_of(context: Context) -> int:
    """The number of the node's client. Raises: InputError: its configuration says none."""
    for key in CLIENT_KEYS:
        if key in context.node_config:
            return int(context.node_config[key])
    raise InputError('this node does not say which client it is: start it with --node-config "client=0".')


def for_node(experiment: str, context: Context) -> str:
    """The experiment, as JSON, in which all devices to be reported are this node's, or whole ones if it reports none: a
    node needs no other's device."""
    asked = Experiment.model_validate_json(experiment)
    if not asked.reported:
        return experiment
    text = profile_text(context)
    own = {"profile": None, **({"keep": 1.0} if text is None else {"profile_text": text})}
    fleet = tuple(one.model_copy(update=own) if one.profile == REPORTED else one for one in asked.fleet)
    return asked.model_copy(update={"fleet": fleet}).model_dump_json()


def answer_train(setting: Setting, plan: Plan, content: RecordDict) -> RecordDict:
    task = received_task(setting, plan, content)
    reply = train_client(task)
    metrics = MetricRecord({EXAMPLES: reply.num_examples, LOSS: reply.loss})
    return RecordDict({ARRAYS: packed(reply.arrays), METRICS: metrics})


def received_task(setting: Setting, plan: Plan, content: RecordDict) -> Task:
    """The task as the server cut it. Raises: InputError: the tensors in the message are not those of the plan."""
    common = setting.common
    sent = unpacked(content.array_records[ARRAYS], size_of(common))
    full = state_arrays(common.network)
    check_names(sent, full)
    shapes = {name: blank(full[name].shape, array) for name, array in sent.items()}
    mask = mask_of(plan.mask, common.analysis.groups.count)
    index_map = index_map_of(setting, mask, shapes, plan.checkpoint)
    task = make_task(setting, plan.number, plan.client, mask, index_map, scaler=plan.scaler)
    for name, array in sent.items():
        if array.shape != task.index_map.tensors[name].submodel_shape:
            raise InputError(f"{name!r} has another shape than the plan's mask gives it.")
    load(task.model, sent)
    return task


def answer_score(setting: Setting, plan: Plan, content: RecordDict) -> RecordDict:
    load_network(setting.common, content)
    found = score_client(setting, plan.number, plan.client, plan.criterion).astype(np.float32)
    return RecordDict({ARRAYS: packed({SIGNIFICANCE: found})})


def answer_choose(setting: Setting, plan: Plan, content: RecordDict) -> RecordDict:
    load_network(setting.common, content)
    old = mask_of(plan.mask, setting.common.analysis.groups.count)
    found = choose_client(setting, plan.number, plan.client, old, plan.criterion, plan.widths)
    return RecordDict({ARRAYS: packed({MASK: np.packbits(found)})})


def load_network(common: Common, content: RecordDict) -> None:
    """Raises: InputError: the message holds another network."""
    sent, own = unpacked(content.array_records[ARRAYS], size_of(common)), state_arrays(common.network)
    check_names(sent, own)
    for name, array in sent.items():
        if array.shape != own[name].shape:
            raise InputError(f"{name!r} is {list(array.shape)}, but this network's is {list(own[name].shape)}.")
    load(common.network, sent)


def check_names(sent: Mapping[str, Array], own: Mapping[str, Array]) -> None:
    """Raises: InputError: a message has not exactly the tensors of a network."""
    if sent.keys() != own.keys():
        raise InputError(
            f"the message and this network are at odds over tensor {sorted(sent.keys() ^ own.keys())[0]!r}."
        )


def load(network: nn.Module, arrays: dict[str, Array]) -> None:
    load_state(network, {name: to_tensor(array.copy()) for name, array in arrays.items()})


def blank(shape: tuple[int, ...], like: Array) -> Array:
    """An array of a shape and type that takes no memory."""
    return np.broadcast_to(np.zeros((), like.dtype), shape)


def size_of(common: Common) -> int:
    """Bytes that the whole network has at most, whatever type the checkpoint stores it in."""
    widest = max(dtype.itemsize for dtype in DTYPES.values())
    return widest * sum(array.size for array in state_arrays(common.network).values())


@lru_cache(maxsize=1)
def common_of(experiment: str, own: str | None) -> Common:
    return prepare_client(Experiment.model_validate_json(experiment), Provenance(tool="cahfp", command="client"), own)


@lru_cache(maxsize=4)
def setting_of(experiment: str, own: str | None, partition: str, seed: int) -> Setting:
    return make_setting(common_of(experiment, own), partition, seed)
