"""The messages of a round.

hello: who are you? A node answers with the number of its client and, if it has one, the text of its device's profile.
train: a *plan* and the submodel's tensors; the answer has tensors of the same shapes, the number of samples, the loss.
score: a plan and the global network's tensors; the answer has one significance a channel group.
choose: the same; the answer has the mask that the client chose.
An answer repeats the id of its plan, so that none can pass for that of another round.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np
from flwr.app import ConfigRecord

from cahfp_cli.errors import InputError
from cahfp_cli.federation.memory import Mask

HELLO, TRAIN, SCORE, CHOOSE = "hello", "submodel", "score", "choose"
"""Actions; with Flower's category in front they are types of messages, such as `train.submodel`."""
PLAN, ARRAYS, METRICS, DEVICE = "plan", "arrays", "metrics", "device"
"""Records of a message."""
CLIENT, EXAMPLES, LOSS, SIGNIFICANCE, MASK, ID = "client", "num_examples", "loss", "significance", "mask", "id"
PROFILE = "profile"


@dataclass(frozen=True)
class Plan:
    """What a client is to do in round `number`: which of its data and random streams to use (partition, seed), and

    mask: to train, the channel groups of its submodel, eight to a byte; to choose, those it had. scaler: see `Task`.
    criterion: to score, by which. widths: to choose, a name in `scoring.SIZED`.
    """

    partition: str
    seed: int
    number: int
    client: int
    checkpoint: str
    mask: bytes = b""
    scaler: bool = False
    criterion: str = ""
    widths: str = ""

    @property
    def id(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def record(self) -> ConfigRecord:
        return ConfigRecord({**asdict(self), ID: self.id})


def read_plan(record: Mapping[str, object]) -> Plan:
    """Raises: InputError: it is none, or not the one that its id belongs to."""
    types = {field.name: field.type for field in fields(Plan)}
    given = {name: value for name, value in record.items() if name != ID}
    if given.keys() != types.keys() or any(type(given[name]) is not kind for name, kind in types.items()):
        raise InputError("the message has no plan that this version understands.")
    plan = Plan(**given)  # type: ignore[arg-type]
    if record.get(ID) != plan.id:
        raise InputError("the plan in the message is not the one that its id belongs to.")
    return plan


def mask_bytes(mask: Mask) -> bytes:
    return np.packbits(mask).tobytes()


def mask_of(data: bytes, groups: int) -> Mask:
    """Raises: InputError: not as many bits as there are channel groups."""
    if len(data) != -(-groups // 8):
        raise InputError(f"the plan's mask has {len(data)} bytes, which is not one bit for each of {groups} groups.")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=groups).astype(bool)
