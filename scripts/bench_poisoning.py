"""Poisoned clients: what a fifth of the clients can do to the global checkpoint, and which rule helps against it.

A slim VGG-11 with batch norm is trained briefly on a public share of Fashion-MNIST (images averaged to 14x14). Then ten
clients train it on shares of their own, round after round; each writes a real submodel folder, and the folders go
through `merge.reconstruct`, gate included. Two of the ten lie. With w what a client was sent and u the update that
honest training on its own share gives it, it sends, of weights and of running statistics alike,

    sign-flipped        w - u
    100x scaled         w + 100 u
    random              w + Gaussian noise of 10 times the norm of u (of weights and of statistics each)
    sign-flipped, 4x    w - 4 u: beyond the bar's three, to show what an amplified flip does

with variances below zero set to zero, as the gate would refuse them. They do so in every round; the start checkpoint is
clean. A client whose training ends in numbers that are not finite sends back what it was sent; a merge that overflows
ends the run with the global checkpoint that it had. A global checkpoint whose outputs are not finite counts as 10%.

Fleets:

    iid             ten full-width clients with shares alike; the bar is on this one. `covered` is not listed, as it
                    is the same as `fill` where all clients hold everything
    dirichlet 0.5   the same with shares unlike by class and size (Dirichlet, alpha 0.5)
    mixed           iid shares; five clients are full, five hold the first half of each layer's channels, so that the
                    other half has five holders. The liars are one of each width, or (`..., both full`) two full ones
    from scratch    as iid, but from random weights: after the public training there is little left to gain in a few
                    rounds, so little to lose for whoever only slows learning down

How to read the output: for each fleet a table of test accuracy in percent, mean and standard deviation over seeds, one
row an attack; and one of points lost against the same seed's attack-free run with `fill`, the mean and in brackets
the worst seed. `gained` is what that run gains in all: a global checkpoint that never moved loses as much.

The bar, on means: on `iid`, trimmed-mean and fill with clipping lose at most 3 points under each of the first three
attacks, and fill alone loses more than 3.

    python scripts/bench_poisoning.py [--quick] [--fleet NAME]

--quick has one seed, three rounds, 2,000 test images and the iid fleet only; the full run takes some ten minutes of one
core. The last line is JSON: each figure, the bar beside it (none: it is only reported), and `holds`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cahfp_cli.checkpoint.digest import arrays_digest
from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.checkpoint.metadata import CheckpointMetadata, ModelSpec, Provenance, SubmodelMetadata, dump_metadata
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.coupling.analysis import analyse, cut
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.data.spec import load_data
from cahfp_cli.errors import InputError
from cahfp_cli.formats.files import INDEX_MAP, TENSORS
from cahfp_cli.formats.gathering import gather
from cahfp_cli.formats.index_map import IndexMap
from cahfp_cli.formats.index_map_file import write_index_map
from cahfp_cli.models.tensors import state_arrays
from cahfp_cli.models.vgg import vgg11
from cahfp_cli.output import table
from cahfp_cli.pruning.submodel import make_index_map, trained_arrays, with_arrays
from cahfp_cli.reconstruction.merge import reconstruct
from cahfp_cli.reconstruction.updates import is_statistic
from cahfp_cli.running.evaluation import evaluate
from cahfp_cli.training.sgd import TrainOptions, train

CLIENTS = 10
SHAPE, CLASSES, WIDTH = (1, 14, 14), 10, 0.125
PUBLIC, PRIVATE = 2_000, 6_000
START = TrainOptions(epochs=2, lr=0.05)
LOCAL = TrainOptions(epochs=1, lr=0.02, schedule="constant")
POINTS_BAR = 3.0
CHANCE = 1 / CLASSES
CPU = torch.device("cpu")
PROVENANCE = Provenance(tool="bench", command="bench_poisoning")
MODEL = ModelSpec(spec="vgg11", args={"width": WIDTH})

Arrays = dict[str, Array]
Random = np.random.Generator
RULES: Mapping[str, dict[str, Any]] = {
    "fill": {"rule": "fill"},
    "fill, clip": {"rule": "fill", "clip": "median"},
    "trimmed-mean": {"rule": "trimmed-mean"},
    "trimmed-mean, clip": {"rule": "trimmed-mean", "clip": "median"},
    "median": {"rule": "median"},
    "covered": {"rule": "covered"},
}
ALIKE = tuple(rule for rule in RULES if rule != "covered")
BARS: Mapping[str, Callable[[float], bool]] = {
    "fill": lambda lost: lost > POINTS_BAR,
    "fill, clip": lambda lost: lost <= POINTS_BAR,
    "trimmed-mean": lambda lost: lost <= POINTS_BAR,
}
SCRATCH = "from scratch"
BOTH_FULL = "100x scaled, both full"
BARRED = ("sign-flipped", "100x scaled", "random")


@dataclass(frozen=True)
class Size:
    """How much to do. fleets: by name, the attacks and rules that are tried on each. tested: test images."""

    seeds: int
    rounds: int
    tested: int
    fleets: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]


ALL = ("none", *BARRED, "sign-flipped, 4x")
FULL = Size(
    3,
    4,
    10_000,
    {
        "iid": (ALL, ALIKE),
        "dirichlet 0.5": (("none", "sign-flipped", "100x scaled"), ("fill", "fill, clip", "trimmed-mean", "median")),
        "mixed": (
            ("none", "100x scaled", BOTH_FULL),
            ("fill", "covered", "fill, clip", "trimmed-mean", "median"),
        ),
        SCRATCH: (("none", "sign-flipped"), ("fill", "fill, clip", "trimmed-mean")),
    },
)
QUICK = Size(1, 3, 2_000, {"iid": (("none", *BARRED), ALIKE)})

# ---------------------------------------------------------------------------------------------------- attacks


def moved(sent: Arrays, honest: Arrays, by: Callable[[str, Array], Array]) -> Arrays:
    """What is sent back: w + by(name, u) for floats, as the gate lets it pass; counters are the honest ones."""
    result = {}
    for name, before in sent.items():
        if before.dtype.kind != "f":
            result[name] = honest[name]
            continue
        start = before.astype(np.float64)
        after = start + by(name, honest[name].astype(np.float64) - start)
        if name.endswith("running_var"):
            after = np.maximum(after, 0)
        most = np.finfo(before.dtype).max
        result[name] = np.clip(after, -most, most).astype(before.dtype)
    return result


def noise(sent: Arrays, honest: Arrays, random: Random) -> Arrays:
    """Gaussian, of weights and of statistics each with 10 times the norm of the honest update."""
    floats = {name: array for name, array in sent.items() if array.dtype.kind == "f"}
    drawn = {name: random.standard_normal(array.shape) for name, array in floats.items()}
    scale = {}
    for kind in (False, True):
        names = [name for name in floats if is_statistic(name) == kind]
        honest_norm = np.sqrt(sum(np.sum((honest[n].astype(np.float64) - floats[n]) ** 2) for n in names))
        scale[kind] = 10 * honest_norm / np.sqrt(sum(np.sum(drawn[n] ** 2) for n in names))
    return moved(sent, honest, lambda name, _: scale[is_statistic(name)] * drawn[name])


def scaled(sent: Arrays, honest: Arrays, random: Random) -> Arrays:
    return moved(sent, honest, lambda _, u: 100 * u)


ATTACKS: Mapping[str, Callable[[Arrays, Arrays, Random], Arrays]] = {
    "none": lambda sent, honest, random: honest,
    "sign-flipped": lambda sent, honest, random: moved(sent, honest, lambda _, u: -u),
    "100x scaled": scaled,
    BOTH_FULL: scaled,
    "random": noise,
    "sign-flipped, 4x": lambda sent, honest, random: moved(sent, honest, lambda _, u: -4 * u),
}

# ----------------------------------------------------------------------------------------------------- fleets


@dataclass(frozen=True)
class Client:
    """model: compact, its numbers are replaced each round. index_map: of a checkpoint by its digest."""

    share: Dataset
    model: nn.Module
    index_map: Callable[[str], IndexMap]


def halved(dataset: Dataset) -> Dataset:
    """Images averaged over squares of 2x2 pixels."""
    n, channels, height, width = dataset.x.shape
    x = dataset.x.reshape(n, channels, height // 2, 2, width // 2, 2).mean(axis=(3, 5), dtype=np.float32)
    return Dataset(np.ascontiguousarray(x), dataset.y, dataset.classes, dataset.name)


@cache
def images(split: str, first: int, last: int) -> Dataset:
    return halved(load_data(f"fashion-mnist@{split}[{first}:{last}]"))


def shares(data: Dataset, alpha: float | None, random: Random) -> list[Dataset]:
    """One share a client; without alpha of equal size and shuffled, otherwise each class by a Dirichlet distribution,
    drawn again while a client would have fewer images than a batch."""
    while True:
        if alpha is None:
            parts = np.array_split(random.permutation(len(data)), CLIENTS)
        else:
            own: list[list[Array]] = [[] for _ in range(CLIENTS)]
            for label in range(CLASSES):
                members = random.permutation(np.flatnonzero(data.y == label))
                cuts = (np.cumsum(random.dirichlet([alpha] * CLIENTS))[:-1] * len(members)).astype(np.int64)
                for client, part in enumerate(np.split(members, cuts)):
                    own[client].append(part)
            parts = [np.concatenate(each) for each in own]
        if min(map(len, parts)) >= LOCAL.batch_size:
            return [Dataset(data.x[part], data.y[part], data.classes, f"share {k}") for k, part in enumerate(parts)]


def fleet_of(name: str, model: nn.Module, seed: int) -> list[Client]:
    random = np.random.default_rng((seed, 1))
    private = images("train", PUBLIC, PUBLIC + PRIVATE)
    own = shares(private, 0.5 if name.startswith("dirichlet") else None, random)
    analysis = analyse(model, SHAPE)
    groups = analysis.groups
    family_size = np.bincount(groups.family)
    place = np.zeros(groups.count, np.int64)
    for family in range(len(groups.names)):
        place[groups.family == family] = np.arange(family_size[family])
    whole, half = np.ones(groups.count, np.bool_), place < family_size[groups.family] / 2
    arrays = state_arrays(model)
    cuts = [(kept, *cut(model, analysis, kept)) for kept in (whole, half)]
    clients = []
    for number, share in enumerate(own):
        kept, compact, rewrites = cuts[name == "mixed" and number >= CLIENTS // 2]

        def index_map(digest: str, kept: Any = kept, rewrites: Any = rewrites) -> IndexMap:
            return make_index_map(arrays, groups, kept, digest, rewrites)

        clients.append(Client(share, compact, index_map))
    return clients


# ----------------------------------------------------------------------------------------------------- rounds


class Run:
    """One fleet and seed; what clients learn in the first round is the same for all attacks and rules, and kept."""

    def __init__(self, name: str, start: nn.Module, seed: int, size: Size) -> None:
        self.name, self.start, self.seed, self.size = name, start, seed, size
        self.clients = fleet_of(name, start, seed)
        self.first: list[tuple[Arrays, Arrays]] | None = None

    def learnt(self, arrays: Arrays, digest: str, number: int) -> list[tuple[Arrays, Arrays]]:
        """For each client what it is sent, and what honest training makes of it."""
        if number == 0 and self.first is not None:
            return self.first
        result = []
        for k, client in enumerate(self.clients):
            index_map = client.index_map(digest)
            sent = {name: gather(arrays[name], entry) for name, entry in index_map.tensors.items()}
            model = with_arrays(client.model, {name: array.copy() for name, array in sent.items()})
            how = TrainOptions(**{**vars(LOCAL), "seed": 1000 * self.seed + 100 * number + k})
            try:
                train(model, client.share, how, CPU)
                result.append((sent, {name: a.copy() for name, a in trained_arrays(model, index_map).items()}))
            except InputError:
                result.append((sent, sent))
        if number == 0:
            self.first = result
        return result

    def accuracy(self, attack: str, rule: str, folder: Path) -> float:
        """Test accuracy of the global checkpoint after all rounds."""
        checkpoint = folder / "global.safetensors"
        arrays = {name: array.copy() for name, array in state_arrays(self.start).items()}
        record = CheckpointMetadata(model=MODEL, input_shape=SHAPE, classes=CLASSES, provenance=PROVENANCE)
        save_arrays(checkpoint, arrays, dump_metadata(record))
        liars = (0, CLIENTS // 2) if self.name == "mixed" and attack != BOTH_FULL else (0, 1)
        for number in range(self.size.rounds):
            digest = arrays_digest(arrays)
            folders = []
            for k, (sent, honest) in enumerate(self.learnt(arrays, digest, number)):
                client = self.clients[k]
                random = np.random.default_rng((self.seed, 2, number, k))
                back = ATTACKS[attack](sent, honest, random) if k in liars else honest
                folders.append(write(folder / f"client{k}", client, digest, back))
            try:
                reconstruct(checkpoint, folders, checkpoint, force=True, provenance=PROVENANCE, **RULES[rule])
            except InputError as error:
                print(f"  {attack}, {rule}, round {number + 1}: {str(error).splitlines()[0][-90:]}", flush=True)
                break
            with open_safetensors(checkpoint) as file:
                arrays = {name: file.read(name) for name in file.tensors}
        model = with_arrays(vgg11(SHAPE, CLASSES, WIDTH), arrays)
        try:
            return evaluate(model, images("test", 0, self.size.tested), 500, CPU).accuracy
        except InputError:
            return CHANCE


def write(folder: Path, client: Client, digest: str, arrays: Arrays) -> Path:
    """A client's upload."""
    folder.mkdir(exist_ok=True)
    write_index_map(folder / INDEX_MAP, client.index_map(digest), PROVENANCE)
    record = SubmodelMetadata(
        model=MODEL,
        input_shape=SHAPE,
        classes=CLASSES,
        checkpoint=digest,
        num_examples=len(client.share),
        provenance=PROVENANCE,
    )
    save_arrays(folder / TENSORS, arrays, dump_metadata(record))
    return folder


@cache
def started(seed: int, from_scratch: bool) -> nn.Module:
    torch.manual_seed(seed)
    model = vgg11(SHAPE, CLASSES, WIDTH)
    if from_scratch:
        return model.eval()
    train(model, images("train", 0, PUBLIC), TrainOptions(**{**vars(START), "seed": seed}), CPU)
    return model


# ------------------------------------------------------------------------------------------------------ report


def report(
    name: str, found: Mapping[tuple[str, str], list[float]], at_start: list[float], size: Size
) -> dict[str, Any]:
    """Print a fleet's tables; its figures. found: accuracy in percent by seed, of attack and rule; at_start: likewise,
    before the first round."""
    attacks, rules = size.fleets[name]
    reference = np.array(found["none", "fill"])
    accuracy_rows, lost_rows = [], []
    gained = float(reference.mean() - np.mean(at_start))
    figures: dict[str, Any] = {f"{name}: gained": {"value": round(gained, 2), "bar": None}}
    for attack in attacks:
        accuracy_rows.append([attack])
        lost_rows.append([attack])
        for rule in rules:
            values = np.array(found[attack, rule])
            lost = reference - values
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            accuracy_rows[-1].append(f"{values.mean():.1f} ± {spread:.1f}")
            lost_rows[-1].append(f"{lost.mean():.1f} ({lost.max():.1f})")
            key = f"{name}: {attack}: {rule}"
            figures[key] = {
                "accuracy": round(float(values.mean()), 2),
                "spread": round(float(spread), 2),
                "value": round(float(lost.mean()), 2),
                "worst": round(float(lost.max()), 2),
                "bar": None,
            }
            if name == "iid" and attack in BARRED and rule in BARS:
                sign = "> " if rule == "fill" else "<= "
                figures[key] |= {"bar": f"{sign}{POINTS_BAR:g}", "holds": BARS[rule](float(lost.mean()))}
    print(f"\n{name}: start {np.mean(at_start):.1f}%, gained {gained:.1f} points in {size.rounds} rounds")
    print(f"\n{name}: accuracy, %, mean and standard deviation of {size.seeds} seed(s)\n")
    print(table(["attack", *rules], accuracy_rows))
    print(f"\n{name}: points lost against attack-free fill, mean (worst seed)\n")
    print(table(["attack", *rules], lost_rows), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer rounds, the iid fleet only")
    parser.add_argument("--fleet", choices=FULL.fleets, help="only this one")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    if options.fleet:
        size = replace(size, fleets={options.fleet: FULL.fleets[options.fleet]})
    torch.set_num_threads(1)
    wall, spent = time.monotonic(), time.process_time()
    test = images("test", 0, size.tested)
    figures: dict[str, Any] = {}
    for name, (attacks, rules) in size.fleets.items():
        found: dict[tuple[str, str], list[float]] = {(attack, rule): [] for attack in attacks for rule in rules}
        at_start = []
        for seed in range(size.seeds):
            start = started(seed, name == SCRATCH)
            at_start.append(100 * evaluate(start, test, 500, CPU).accuracy)
            run = Run(name, start, seed, size)
            for attack, rule in found:
                with tempfile.TemporaryDirectory() as folder:
                    found[attack, rule].append(100 * run.accuracy(attack, rule, Path(folder)))
        figures |= report(name, found, at_start, size)
    seconds = time.process_time() - spent
    print(f"\n{seconds:.0f} s of CPU time, {time.monotonic() - wall:.0f} s in all\n")
    failing = [key for key, figure in figures.items() if figure.get("holds") is False]
    for key in failing:
        print(f"does not hold: {key}: {figures[key]['value']} points lost, bar {figures[key]['bar']}")
    holds = not failing if "iid" in size.fleets else None  # the other fleets have no bar
    print(json.dumps({"quick": options.quick, **figures, "holds": holds}))


if __name__ == "__main__":
    main()
