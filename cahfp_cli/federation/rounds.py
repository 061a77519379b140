"""One round: choose clients and masks, cut, train, look at the replies, merge."""

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cahfp_cli.checkpoint.atomic import atomic_file
from cahfp_cli.checkpoint.digest import arrays_digest
from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.checkpoint.metadata import dump_metadata
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.coupling.analysis import check_slice
from cahfp_cli.device.derived import BACKWARD
from cahfp_cli.errors import InputError, first_line
from cahfp_cli.federation.client import CPU, Task, rates_of, samples_seen
from cahfp_cli.federation.clients import Clients
from cahfp_cli.federation.cutting import compact
from cahfp_cli.federation.experiment import Experiment
from cahfp_cli.federation.gate import checked_scores, fault_of, fault_of_mask
from cahfp_cli.federation.memory import Mask, Memory
from cahfp_cli.federation.merging import Merger
from cahfp_cli.federation.methods import Method
from cahfp_cli.federation.scoring import SIZED, level, nested, renewed
from cahfp_cli.federation.selections import Situation, picked
from cahfp_cli.federation.setting import Setting
from cahfp_cli.federation.streams import Purpose, derived
from cahfp_cli.formats.index_map import IndexMap
from cahfp_cli.models.checkpoint_io import check_tensors
from cahfp_cli.models.tensors import load_state, to_tensor
from cahfp_cli.models.undisturbed import undisturbed
from cahfp_cli.pruning.submodel import make_index_map
from cahfp_cli.reconstruction.clients import Client
from cahfp_cli.running.logits import class_logits
from cahfp_cli.significance.registry import find_criterion
from cahfp_cli.training.sgd import TrainOptions

OPERATIONS_A_MAC = 2
SCORE_BYTES = 4
"""A significance goes over the wire in float32."""
TRIED = 8
"""Samples that a merged network is tried on."""
LONGEST_REASON = 200
"""Characters of why a client was left out, which may be the client's own."""


@dataclass(frozen=True)
class Outcome:
    """What a round did. loss: mean training loss of the replies merged, by examples, None if there were none.
    dropped: why, by client; unscored: why a client's scores or mask were not taken. uploaded: bytes of all replies and
    scores. flops: of the clients, predicted. failed: why nothing was merged, so that the global checkpoint stayed as it
    was; None if it went well. merged: masks of the clients whose replies were. coverage: how many entries of each
    weight 0, 1, 2, ... of them hold."""

    memory: Memory
    clients: tuple[int, ...]
    dropped: Mapping[int, str]
    unscored: Mapping[int, str]
    loss: float | None
    uploaded: int
    flops: float
    failed: str | None
    merged: Mapping[int, Mask]
    coverage: Mapping[str, tuple[int, ...]]


def load_global(setting: Setting, checkpoint: Path) -> dict[str, Array]:
    """Put a checkpoint's values into the setting's network; returns them too. Raises: InputError: it is of another."""
    with open_safetensors(checkpoint) as file:
        arrays = {name: file.read(name) for name in file.tensors}
    tensors = {name: to_tensor(array.copy()) for name, array in arrays.items()}
    check_tensors(checkpoint, tensors, setting.common.network)
    load_state(setting.common.network, tensors)  # complete up to tied names: check_tensors saw to it
    return arrays


def situation_of(setting: Setting, number: int, weights: Mapping[str, Array], memory: Memory) -> Situation:
    """What selections look at in round `number`, when the network has these weights."""
    common = setting.common
    return Situation(setting.seed, number, common.analysis.groups, common.devices, common.network, weights, memory)


def run_round(
    setting: Setting, method: Method, number: int, checkpoint: Path, memory: Memory, output: Path, fleet: Clients
) -> Outcome:
    """Run round `number` (0, 1, ...) from the global `checkpoint` to the new one, `output`.

    A client whose training fails or whose reply is unsound is left out; with fewer replies than the quorum, or where
    the merged numbers overflow, the global checkpoint stays as it was.
    """
    common, experiment = setting.common, setting.experiment
    arrays = load_global(setting, checkpoint)
    digest, merger = arrays_digest(arrays), Merger.of(arrays, common.metadata())
    eligible = np.array([device.is_full or not method.strong_only for device in common.devices])
    if not eligible.any():
        raise InputError("fedavg-strong: no device of the fleet holds the whole network; leave this method out.")
    clients = picked(len(eligible), experiment.clients_per_round, eligible, setting.seed, number)
    scored = with_scores(setting, method, number, clients.tolist(), memory, fleet)
    memory, uploaded, flops = scored.memory, scored.uploaded, scored.flops
    situation = situation_of(setting, number, arrays, memory)
    masks = {client: trained_mask(situation, setting, method, client) for client in clients.tolist()}
    dropped: dict[int, str] = {}
    admitted: list[Client] = []
    losses: list[tuple[int, float]] = []

    def tasks() -> Iterator[Task]:
        maps: dict[bytes, IndexMap] = {}  # of clients with the same mask it is the same one
        for client, mask in masks.items():
            key = mask.tobytes()
            maps[key] = maps.get(key) or index_map_of(setting, mask, arrays, digest)
            yield make_task(setting, number, client, mask, maps[key], scaler=method.scaler)

    for task, reply in fleet.train(setting, tasks()):
        client = task.client
        fault = reply if isinstance(reply, str) else fault_of(reply, task.index_map)
        samples = setting.samples_of(client)
        if samples is None:  # known from the client alone, if it says anything sound
            samples = 0 if isinstance(reply, str) or fault is not None else reply.num_examples
        elif fault is None and not isinstance(reply, str) and reply.num_examples != samples:
            fault = f"num_examples is {reply.num_examples}, but it has {samples} samples"
        flops += training_flops(setting, client, task.mask, samples, task.options)
        if isinstance(reply, str) or fault is not None:
            dropped[client] = str(fault)[:LONGEST_REASON]
            continue
        try:
            admitted.append(merger.admitted(client, reply.arrays, reply.num_examples, task.index_map))
        except InputError as error:
            dropped[client] = first_line(error)[:LONGEST_REASON]
            continue
        uploaded += sum(array.nbytes for array in reply.arrays.values())
        losses.append((reply.num_examples, reply.loss))
    done = Outcome(memory, tuple(clients.tolist()), dropped, scored.unscored, None, uploaded, flops, None, {}, {})
    try:
        if len(admitted) < experiment.quorum:
            raise InputError(f"{len(admitted)} sound replies, and the quorum is {experiment.quorum}")
        merged = merger.merged(admitted, method.rule or experiment.rule)
        if not computes(setting, merged.arrays):
            raise InputError("with the merged weights the network's outputs are not finite")
    except InputError as error:
        with atomic_file(output, force=True) as temporary:
            shutil.copyfile(checkpoint, temporary)
        return replace(done, failed=first_line(error))
    with atomic_file(output, force=True) as temporary:
        save_arrays(temporary, merged.arrays, dump_metadata(merger.record(admitted)))
    counts = {tensor.name: tensor.counts for tensor in merged.coverage}
    return replace(
        done,
        loss=sum(n * value for n, value in losses) / sum(n for n, _ in losses),
        merged={client: mask for client, mask in masks.items() if client not in dropped},
        coverage={name: counts[name] for name in common.network.state_dict() if name in counts},  # in its order
    )


def computes(setting: Setting, arrays: Mapping[str, Array]) -> bool:
    """Whether the network gives finite outputs with these weights, which finite weights may be too large for. It keeps
    them."""
    common = setting.common
    samples = common.public or common.test
    assert samples is not None
    load_state(common.network, {name: to_tensor(array) for name, array in arrays.items()})
    with undisturbed(common.network), torch.inference_mode():
        logits = class_logits(common.network, samples.x[:TRIED], common.classes, CPU)
    return bool(torch.isfinite(logits).all())


def index_map_of(setting: Setting, mask: Mask, arrays: Mapping[str, Array], digest: str) -> IndexMap:
    """What a submodel holds of the checkpoint of these tensors and this content digest."""
    common = setting.common
    rewrites = check_slice(common.network, common.analysis, mask) if common.analysis.rewritten else ()
    return make_index_map(arrays, common.analysis.groups, mask, digest, rewrites)


def make_task(setting: Setting, number: int, client: int, mask: Mask, index_map: IndexMap, *, scaler: bool) -> Task:
    """Cut a client's submodel from the network, which has the values of the checkpoint of the index map."""
    common = setting.common
    model = compact(common.network, common.analysis, mask)
    seed = derived(Purpose.TRAINING, setting.seed, number, client)
    options = train_options(setting, learning_rate(setting.experiment, number), seed)
    rates = rates_of(model, index_map) if scaler else {}
    return Task(client, number, mask, model, index_map, setting.data_of(client), options, scaler, rates)


def learning_rate(experiment: Experiment, number: int) -> float:
    """That of all steps of round `number`; over R rounds, cosine is lr (1 + cos(pi number / R)) / 2."""
    how = experiment.train
    if how.schedule == "constant":
        return how.lr
    return how.lr * (1 + math.cos(math.pi * number / experiment.rounds)) / 2


def train_options(setting: Setting, lr: float, seed: int) -> TrainOptions:
    """The experiment's local training at a learning rate, with the random stream of `seed`."""
    how = setting.experiment.train
    return TrainOptions(
        epochs=how.epochs,
        steps=how.steps,
        batch_size=how.batch_size,
        lr=lr,
        momentum=how.momentum,
        weight_decay=how.weight_decay,
        schedule="constant",
        balanced=how.balanced,
        seed=seed,
    )


def training_flops(setting: Setting, client: int, mask: Mask, samples: int, options: TrainOptions) -> float:
    """Operations of a client's training in a round, two a multiply-accumulate, forward and backward."""
    cost = setting.common.devices[client].cost
    macs = float(cost.cost(setting.common.analysis.groups.widths(mask), memory=False).macs)
    return OPERATIONS_A_MAC * macs * (1 + BACKWARD) * samples_seen(samples, options)


def first_memory(setting: Setting, method: Method) -> Memory:
    """The memory of a method before the first round: no scores, and masks as of groups that are all worth the same."""
    groups = setting.common.analysis.groups
    worth = level(groups)
    masks = {id(one): SIZED[method.widths](worth, groups, one.cost, one.budget) for one in setting.common.devices}
    return Memory.new(np.stack([masks[id(one)] for one in setting.common.devices]))


@dataclass(frozen=True)
class Scored:
    """Bytes sent, and operations: of a forward pass and one backward pass a class, which computes no gradients of
    weights and so counts as a forward pass. unscored: why a client's answer was not taken."""

    memory: Memory
    uploaded: int
    flops: float
    unscored: Mapping[int, str]


def with_scores(
    setting: Setting, method: Method, number: int, clients: list[int], memory: Memory, fleet: Clients
) -> Scored:
    """Every `rescore_every` rounds let the clients of the round score the global network on their own data, and renew
    all masks; or let them choose their own, of which an unsound one is as if it had not come.

    An untrained network is not scored: its curvature ranks nothing.
    """
    table, common, uploaded, flops = setting.experiment.selection, setting.common, 0, 0.0
    unscored: dict[int, str] = {}
    cold = setting.experiment.start.cold
    if method.scoring == "none" or number % table.rescore_every or (cold and number == 0):
        return Scored(memory, uploaded, flops, unscored)
    criterion = find_criterion(table.criterion if method.scoring == "experiment" else method.scoring)
    for client in clients:
        samples = min(table.samples, setting.samples_of(client) or table.samples)
        macs = float(common.devices[client].cost.full.macs)
        flops += OPERATIONS_A_MAC * macs * (1 + common.classes) * samples * (criterion.needs == "gates")
    if table.by == "client":
        masks = {client: memory.masks[client] for client in clients}
        for client, mask in fleet.choose(setting, number, masks, criterion.name, method.widths):
            even = method.widths == "even"
            fault = (
                mask
                if isinstance(mask, str)
                else fault_of_mask(mask, common.analysis.groups, common.devices[client], even=even)
            )
            if isinstance(mask, str) or fault is not None:
                unscored[client] = str(fault)[:LONGEST_REASON]
                continue
            uploaded += math.ceil(mask.size / 8)
            memory = memory.with_mask(client, mask)
        return Scored(memory, uploaded, flops, unscored)
    for client, found in fleet.score(setting, number, clients, criterion.name):
        sound = None if isinstance(found, str) else checked_scores(found, common.analysis.groups.count)
        if sound is None:
            unscored[client] = found[:LONGEST_REASON] if isinstance(found, str) else "its scores are unsound"
            continue
        uploaded += SCORE_BYTES * len(sound)
        memory = memory.with_score(client, sound, number, table.decay)
    mix = table.score_mix if method.mix is None else method.mix
    churn = table.churn if number else 1.0  # the first masks knew nothing of what a trained network learnt
    memory = renewed(memory, common.devices, common.analysis.groups, mix, churn, SIZED[method.widths])
    return Scored(memory, uploaded, flops, unscored)


def trained_mask(situation: Situation, setting: Setting, method: Method, client: int) -> Mask:
    """What a client trains this round: its mask, or at times the part of it that the smallest device has, so that the
    smallest submodel is trained by everybody."""
    own = method.choose(situation, client)
    random = np.random.default_rng(derived(Purpose.SELECTION, situation.seed, situation.number, client))
    if not method.nesting or random.random() >= setting.experiment.selection.nesting:
        return own
    masks, family = situation.memory.masks, situation.groups.family
    sizes = np.array([device.widths.sum() for device in situation.devices])  # not of masks, which clients may choose
    smallest = masks[int(random.choice(np.flatnonzero(sizes == sizes.min())))]
    worth = situation.memory.significance(client, 1.0)
    return nested(own, smallest, level(situation.groups) if worth is None else worth, family)
