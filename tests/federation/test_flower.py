"""Rounds over Flower give what rounds in one process give, whatever single clients send."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'cahfp[federated]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from cahfp_cli.data.spec import load_data
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.federation.client import Reply, Task, train_client
from cahfp_cli.federation.experiment import Experiment
from cahfp_cli.federation.flower.apps import described
from cahfp_cli.federation.flower.client import make_client_app
from cahfp_cli.federation.flower.protocol import ARRAYS, CLIENT, EXAMPLES, LOSS, MASK, METRICS, PLAN, Plan, read_plan
from cahfp_cli.federation.flower.server import FlowerClients
from cahfp_cli.federation.flower.wire import packed, unpacked
from cahfp_cli.federation.simulation import Run, simulate
from tests.federation.test_rounds import finals, without_seconds
from tests.support.experiments import PROVENANCE, experiment
from tests.support.in_process import InProcessGrid


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


ROOT = Path(__file__).parents[2]
Change = Callable[[int, Message], Message | None]


def over_flower(
    asked: Experiment,
    output: Path,
    change: Change = lambda client, reply: reply,
    configs: Mapping[int, dict[str, str]] | None = None,
) -> tuple[tuple[Run, ...], InProcessGrid]:
    grid = InProcessGrid(make_client_app(lambda context: asked.model_dump_json()), asked.clients, change, configs)
    return simulate(asked, output, PROVENANCE, fleet=FlowerClients(grid, deadline=5, joining=0)), grid


def test_three_rounds_over_flower_equal_those_in_one_process(tmp_path: Path) -> None:
    asked = experiment(methods=["cahfp", "heterofl"], clients_per_round=6)
    local = simulate(asked, tmp_path / "local", PROVENANCE)
    flower, grid = over_flower(asked, tmp_path / "flower")
    assert finals(tmp_path / "flower") == finals(tmp_path / "local")
    assert without_seconds(flower) == without_seconds(local)
    kinds = [message.metadata.message_type for _, message in grid.messages]
    assert kinds.count("query.hello") == 6 and kinds.count("query.score") == 6
    assert kinds.count("train.submodel") == 2 * 3 * 6


def test_data_that_only_the_devices_have_gives_the_same_rounds(tmp_path: Path) -> None:
    digits, random = load_data("digits@train[0:200]"), np.random.default_rng(0)
    users = random.permutation(np.arange(200) % 4)
    users[digits.y >= 7] = 0  # the others know nothing of three classes
    np.savez(tmp_path / "all.npz", x=digits.x, y=digits.y, user=users)
    for user in range(4):
        np.savez(tmp_path / f"{user}.npz", x=digits.x[users == user], y=digits.y[users == user])
    shared = {"test": "digits@test[0:100]", "public": "digits@train[200:300]"}
    common = {
        "fleet": [{"count": 2, "keep": 1.0}, {"count": 2, "params": 0.25}],
        "rounds": 2,
        "train": {"balanced": True},
    }
    here = experiment(partitions=["by-column(user)"], data={"train": f"npz:{tmp_path / 'all.npz'}", **shared}, **common)
    there = experiment(partitions=["on-device"], data={"classes": 10, **shared}, **common)
    local = simulate(here, tmp_path / "local", PROVENANCE)
    configs = {user: {"data": f"npz:{tmp_path / str(user)}.npz"} for user in range(4)}
    flower, _ = over_flower(there, tmp_path / "flower", configs=configs)
    assert list(finals(tmp_path / "flower").values()) == list(finals(tmp_path / "local").values())
    (ours,), (theirs,) = without_seconds(flower), without_seconds(local)
    for row in theirs:
        row.get("accuracy", {}).update(own=None, tuned=None)
    assert ours == theirs
    result = json.loads((tmp_path / "flower" / "summary.json").read_text())["results"][0]
    assert result["own"] is None and result["deployed"]["mean"] > 0

    del configs[1]
    configs[3] = {"data": f"npz:{tmp_path / 'all.npz'}[0:3]"}
    runs, _ = over_flower(there, tmp_path / "two", configs=configs)
    assert "start it with --node-config" in runs[0].rows[0]["dropped"]["1"]
    assert "at least 4" in runs[0].rows[0]["dropped"]["3"]
    with pytest.raises(UsageError, match="no data of their own"):
        simulate(there, tmp_path / "none", PROVENANCE)


def test_nodes_report_their_devices(tmp_path: Path) -> None:
    text = (ROOT / "profiles" / "stm32h743.toml").read_text()
    small = tmp_path / "small.toml"
    small.write_text(text.replace('storage = "1.5MB"', "params = 0.25"))
    more = {"rounds": 2, "clients_per_round": 3, "selection": {"by": "client", "rescore_every": 1, "samples": 16}}
    named = [{"count": 1, "keep": 1.0}, {"count": 1, "profile": "raspberry-pi-4"}, {"count": 1, "profile": str(small)}]
    local = simulate(experiment(fleet=named, **more), tmp_path / "local", PROVENANCE)

    asked = experiment(fleet=[{"count": 1, "keep": 1.0}, {"count": 2, "profile": "reported"}], **more)
    configs = {1: {"profile": "raspberry-pi-4"}, 2: {"profile": str(small)}}
    grid = InProcessGrid(make_client_app(lambda context: asked.model_dump_json()), 3, configs=configs)
    fleet = FlowerClients(grid, deadline=5, joining=0)
    flower = simulate(described(asked, fleet, None), tmp_path / "flower", PROVENANCE, fleet=fleet)
    assert finals(tmp_path / "flower") == finals(tmp_path / "local")
    assert without_seconds(flower) == without_seconds(local)
    assert flower[0].rows[-1]["dropped"] == {}

    grid = InProcessGrid(grid.app, 3, configs={1: configs[1]})
    gone = FlowerClients(grid, deadline=5, joining=0)
    with pytest.raises(InputError, match="client 2 has not reported"):
        described(asked, gone, None)
    recorded = described(asked, fleet, None)
    assert described(asked, gone, tmp_path / "flower") == recorded  # a resumed run knows it
    small.write_text(small.read_text() + "\n# edited meanwhile\n")
    other = FlowerClients(InProcessGrid(grid.app, 3, configs=configs), deadline=5, joining=0)
    assert described(asked, other, None) != recorded
    assert described(asked, other, tmp_path / "flower") == recorded
    small.write_text(text.replace("[budget]", "[bugdet]"))
    grid.configs = {1: configs[1], 2: configs[2]}
    spoiled_fleet = FlowerClients(grid, deadline=5, joining=0)
    with pytest.raises(InputError, match="profile of client 2: unknown key 'bugdet'"):
        simulate(described(asked, spoiled_fleet, None), tmp_path / "bad", PROVENANCE, fleet=spoiled_fleet)
    with pytest.raises(UsageError, match="reported"):
        simulate(asked, tmp_path / "none", PROVENANCE)


def test_masks_that_clients_choose_are_the_same_over_flower(tmp_path: Path) -> None:
    table = {"by": "client", "rescore_every": 1, "samples": 16}
    asked = experiment(methods=["cahfp", "cahfp-layers"], clients_per_round=6, selection=table)
    local = simulate(asked, tmp_path / "local", PROVENANCE)
    flower, grid = over_flower(asked, tmp_path / "flower")
    assert finals(tmp_path / "flower") == finals(tmp_path / "local")
    assert without_seconds(flower) == without_seconds(local)
    kinds = [message.metadata.message_type for _, message in grid.messages]
    assert kinds.count("query.choose") == 2 * 2 * 6 and kinds.count("query.score") == 0


def test_chosen_masks_that_cannot_be_read_leave_no_trace(tmp_path: Path) -> None:
    table = {"by": "client", "rescore_every": 1, "samples": 16}
    asked = experiment(rounds=2, clients_per_round=6, selection=table)

    def masks(change: Callable[[Message], Message | None]) -> Change:
        return lambda client, reply: (
            change(reply) if client == 0 and reply.metadata.message_type == "query.choose" else reply
        )

    def as_sent(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Message], Message | None]:
        return spoiled(lambda content: content.update({ARRAYS: packed({MASK: change(mask_in(content))})}))

    def mask_in(content: RecordDict) -> np.ndarray:
        return unpacked(content[ARRAYS], 10**9)[MASK]

    over_flower(asked, tmp_path / "none", masks(lambda reply: None))
    for name, change in {
        "short": as_sent(lambda mask: mask[1:]),
        "long": as_sent(lambda mask: np.concatenate([mask, mask])),
        "empty layers": as_sent(lambda mask: mask * 0),
        "no tensors": spoiled(pop(ARRAYS)),
        "error": lambda reply: failed(reply, Error(2)),
    }.items():
        over_flower(asked, tmp_path / name, masks(change))
        assert finals(tmp_path / name) == finals(tmp_path / "none"), name


def test_a_message_holds_the_submodel_and_little_else(tmp_path: Path) -> None:
    wide = {"spec": "vgg11", "args": {"width": 0.25}}
    asked = experiment(methods=["cahfp-apart"], rounds=1, clients_per_round=6, train={"steps": 1}, model=wide)
    sizes: dict[int, int] = {}

    def watched(task: Task) -> Reply:
        reply = train_client(task)
        sizes[task.client] = sum(array.nbytes for array in reply.arrays.values())
        return reply

    simulate(asked, tmp_path / "local", PROVENANCE, trainer=watched)
    _, grid = over_flower(asked, tmp_path / "flower")
    sent = {client: m for client, m in grid.messages if m.metadata.message_type == "train.submodel"}
    assert sent.keys() == sizes.keys()
    for client, message in sent.items():
        assert sum(len(array.data) for array in message.content[ARRAYS].values()) == sizes[client]
        assert sizes[client] < wire_bytes(message) <= 1.02 * sizes[client]
    assert sizes[5] < sizes[2] < sizes[0]


def wire_bytes(message: Message) -> int:
    """Of all objects that Flower takes a message apart into to send it."""
    return sum(len(found.deflate()) for found in get_all_nested_objects(message).values())


def trained(reply: Message) -> bool:
    return reply.metadata.message_type == "train.submodel"


def spoiled(how: Callable[[RecordDict], None]) -> Callable[[Message], Message | None]:
    def change(reply: Message) -> Message:
        how(reply.content)
        return reply

    return change


def weight(content: RecordDict) -> str:
    return next(name for name, sent in content[ARRAYS].items() if len(sent.shape) == 4)


def with_array(how: Callable[[np.ndarray], np.ndarray]) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        arrays = unpacked(content[ARRAYS], 10**9)
        arrays[weight(content)] = how(arrays[weight(content)].copy())
        content[ARRAYS] = packed(arrays)

    return change


def nan_at_3(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[3] = np.nan
    return array


def with_bytes(data: bytes, dtype: str = "F32", stype: str = "raw", shape: Any = None) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        sent = content[ARRAYS][weight(content)]
        content[ARRAYS][weight(content)] = Array(dtype, sent.shape if shape is None else shape, stype, data)

    return change


def with_metric(name: str, value: float) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content[METRICS] = MetricRecord({**content[METRICS], name: value})

    return change


def pop(record: str) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        del content[record]

    return change


def another_plan(content: RecordDict) -> None:
    content[PLAN] = ConfigRecord({"id": "0" * 16})


def without_a_tensor(content: RecordDict) -> None:
    del content[ARRAYS][weight(content)]


def as_record(content: RecordDict) -> None:
    content[ARRAYS] = ArrayRecord([np.zeros(3)])


def failed(reply: Message, error: Error) -> Message:
    return Message(error=error, metadata=reply.metadata)


def long_name(content: RecordDict) -> None:
    content[ARRAYS] = ArrayRecord({"x" * 5000: Array("F32", (0,), "raw", b"")})


BAD: dict[str, tuple[Callable[[Message], Message | None], str]] = {
    "nan": (spoiled(with_array(nan_at_3)), "holds NaN or infinite"),
    "shape": (spoiled(with_array(lambda array: array[:1])), "has shape"),
    "broadcastable": (spoiled(with_array(lambda array: array[:1, :1, :1, :1])), "has shape"),
    "dtype": (spoiled(with_array(lambda array: array.astype(np.float16))), "is F16, not F32"),
    "larger": (spoiled(with_array(lambda array: np.concatenate([array] * 50))), "more than the"),
    "missing": (spoiled(without_a_tensor), "its tensors are not those"),
    "garbage": (spoiled(with_bytes(b"garbage")), "which is not"),
    "pickle": (spoiled(with_bytes(b"\x80\x04.", stype="pickle")), "is not encoded"),
    "unknown type": (spoiled(with_bytes(b"", dtype="object")), "is not encoded"),
    "huge shape": (spoiled(with_bytes(b"", shape=(10**12, 10**12))), "which is not"),
    "negative shape": (spoiled(with_bytes(b"", shape=(-1, 3))), "is not encoded"),
    "other record": (spoiled(as_record), "is not encoded"),
    "no tensors": (spoiled(pop(ARRAYS)), "cannot be read"),
    "no metrics": (spoiled(pop(METRICS)), "cannot be read"),
    "no plan": (spoiled(pop(PLAN)), "not to the plan"),
    "other plan": (spoiled(another_plan), "not to the plan"),
    "too many examples": (spoiled(with_metric(EXAMPLES, 10**12)), "num_examples is 1000000000000"),
    "negative examples": (spoiled(with_metric(EXAMPLES, -9)), "num_examples is -9"),
    "fractional examples": (spoiled(with_metric(EXAMPLES, 1e12)), "not a whole number"),
    "nan examples": (spoiled(with_metric(EXAMPLES, float("nan"))), "not a whole number"),
    "nan loss": (spoiled(with_metric(LOSS, float("nan"))), "its loss"),
    "endless loss": (spoiled(with_metric(LOSS, 1e308)), "its loss"),
    "error": (lambda reply: failed(reply, Error(2, "\nTraceback\n...")), "error: Traceback"),
    "blank error": (lambda reply: failed(reply, Error(0, " \n ")), "error: without a reason"),
    "unprintable error": (lambda reply: failed(reply, Error(0, "\x1b[2Jgone")), "error: ?[2Jgone"),
    "many axes": (spoiled(with_bytes(b"", shape=(0,) * 20_000)), "is not encoded"),
    "long name": (spoiled(long_name), "longer names"),
    "others' examples": (spoiled(with_metric(EXAMPLES, 10**6)), "but it has"),
    "silent error": (lambda reply: failed(reply, Error(2)), "error: without a reason"),
    "straggler": (lambda reply: None, "no answer within 5 s"),
}


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the run, in one process, in which client 0 never trains."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("silent") / "out"

    def trainer(task: Task) -> Reply:
        if task.client == 0:
            raise InputError("no reply")
        return train_client(task)

    simulate(bad_experiment(), output, PROVENANCE, trainer=trainer)
    return finals(output)


def bad_experiment() -> Experiment:
    return experiment(rounds=2, clients_per_round=6, methods=["heterofl"])


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_is_dropped_as_if_the_client_had_been_silent(
    name: str, silent: dict[str, str], tmp_path: Path
) -> None:
    change, why = BAD[name]
    (run,), _ = over_flower(
        bad_experiment(), tmp_path / "out", lambda c, reply: change(reply) if c == 0 and trained(reply) else reply
    )
    for row in run.rows:
        assert list(row["dropped"]) == ["0"] and why in row["dropped"]["0"], row["dropped"]
    assert finals(tmp_path / "out") == silent


def test_a_node_that_names_no_client_or_one_that_is_taken_has_no_part(silent: dict[str, str], tmp_path: Path) -> None:
    for number, value in enumerate((1, -5, 10**9, 2.5)):

        def posing(client: int, reply: Message, value: float = value) -> Message:
            if client == 0 and reply.metadata.message_type == "query.hello":
                reply.content[METRICS] = MetricRecord({CLIENT: value})
            return reply

        output = tmp_path / str(number)
        (run,), _ = over_flower(bad_experiment(), output, posing)
        assert "0" in run.rows[0]["dropped"]
        if value != 1:  # else node 0, who came first, is client 1, and refuses its tasks
            assert run.rows[0]["dropped"] == {"0": "not connected"}
            assert finals(output) == silent


def test_a_node_whose_hello_failed_is_asked_again_and_strangers_count_for_nobody(tmp_path: Path) -> None:
    asked, hellos = experiment(rounds=2, clients_per_round=6, methods=["heterofl"]), 0

    def change(client: int, reply: Message) -> Message:
        nonlocal hellos
        if reply.metadata.message_type == "query.hello" and client == 0:
            hellos += 1
            if hellos == 1:
                return failed(reply, Error(0, "still starting"))
        if reply.metadata.message_type == "query.hello" and client == 1:
            reply.content[METRICS] = MetricRecord({CLIENT: 6})
        return reply

    (run,), _ = over_flower(asked, tmp_path / "out", change)
    assert [row["dropped"] for row in run.rows] == [
        {"0": "not connected", "1": "not connected"},
        {"1": "not connected"},
    ]


def test_a_node_that_goes_is_left_out_and_takes_part_again_when_it_is_back(tmp_path: Path) -> None:
    asked = experiment(clients_per_round=6, methods=["heterofl"])
    grid = InProcessGrid(make_client_app(lambda context: asked.model_dump_json()), asked.clients)
    node, client = next(iter(grid.nodes.items()))

    def on_round(partition: str, method: str, seed: int, row: dict[str, Any]) -> None:
        grid.nodes.pop(node, None)
        if row["round"] == 2:
            grid.nodes[node] = client

    fleet = FlowerClients(grid, deadline=5, joining=0)
    (run,) = simulate(asked, tmp_path / "out", PROVENANCE, fleet=fleet, on_round=on_round)
    assert [row["dropped"] for row in run.rows] == [{}, {str(client): "not connected"}, {}]


def test_unsound_scores_leave_no_trace(tmp_path: Path) -> None:
    asked = experiment(rounds=1, clients_per_round=6, start={"public_epochs": 1}, data=WITH_PUBLIC)

    def scores(change: Callable[[np.ndarray], np.ndarray]) -> Change:
        def altered(client: int, reply: Message) -> Message:
            if client == 0 and reply.metadata.message_type == "query.score":
                arrays = unpacked(reply.content[ARRAYS], 10**9)
                reply.content[ARRAYS] = packed({n: change(array.copy()) for n, array in arrays.items()})
            return reply

        return altered

    def no_scores(client: int, reply: Message) -> Message | None:
        return None if client == 0 and reply.metadata.message_type == "query.score" else reply

    over_flower(asked, tmp_path / "none", no_scores)
    for name, change in {
        "nan": lambda array: array * np.nan,
        "negative": lambda array: -1 - array,
        "scalar": lambda array: np.asarray(array[0]),
        "short": lambda array: array[1:],
        "long": lambda array: np.concatenate([array, array]),
    }.items():
        (run,), _ = over_flower(asked, tmp_path / name, scores(change))
        assert list(run.rows[0]["unscored"]) == ["0"]
        assert finals(tmp_path / name) == finals(tmp_path / "none"), name


WITH_PUBLIC = {"train": "digits@train[0:400]", "test": "digits@test[0:100]", "public": "digits@train[400:500]"}


def test_a_plan_that_was_tampered_with_is_refused() -> None:
    plan = Plan("iid", 0, 1, 2, "abc", b"\x01")
    assert read_plan(plan.record()) == plan
    for change in ({"seed": 1}, {"seed": "0"}, {"mask": b"\x02"}, {"more": 1}):
        with pytest.raises(InputError):
            read_plan({**plan.record(), **change})
    assert replace(plan, number=2).id != plan.id


@pytest.mark.slow
def test_three_rounds_on_flowers_simulation_engine_equal_those_in_one_process(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'cahfp[federated]'")
    from cahfp_cli.federation.flower.engine import simulate_on_flower

    asked = experiment(methods=["cahfp"], clients_per_round=6)
    local = simulate(asked, tmp_path / "local", PROVENANCE)
    flower = simulate_on_flower(asked, tmp_path / "flower", PROVENANCE, deadline=120)
    assert finals(tmp_path / "flower") == finals(tmp_path / "local")
    assert without_seconds(flower) == without_seconds(local)
