"""Commands on odd networks, with drawn options, on damaged files; and what must hold of whatever they say is done.

A fault is a sentence. Every command must end with a documented code other than 1 and say why in a few lines; what ends
with 0 is checked on its files by `tests/support/independent.py`. Everything drawn follows from one `random.Random`.
"""

import json
import shutil
import struct
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from typer.models import OptionInfo

from cahfp_cli.app import app
from tests.support import independent
from tests.support.commands import Done, run_here
from tests.support.odd_networks import CLASSES, NETWORKS, Odd, make

DOCUMENTED = (0, 2, 3, 4, 5)
MOST_LINES = 6
"""Of an error's text: two lines of ours, or Typer's usage and hint."""
SAMPLES = 8
QUIET = ("--threads", 1, "--quiet")
Faults = list[str]


def complaint(said: Done, command: Sequence[object]) -> Faults:
    """What is wrong with how a command ended."""
    shown = f"cahfp {' '.join(map(str, command))}"
    if said.code not in DOCUMENTED:
        return [f"exit {said.code}: {shown}\n    {said.error[-600:]}"]
    if "Traceback" in said.stderr:
        return [f"a traceback: {shown}\n    {said.error[-600:]}"]
    lines = [line for line in said.stderr.splitlines() if line.strip() and not line.startswith("warning:")]
    if said.code != 0 and not 1 <= len(lines) <= MOST_LINES:
        return [f"an error of {len(lines)} lines: {shown}\n    {said.error[-600:]}"]
    return []


@dataclass
class Bench:
    """One odd network's files, and the faults found so far; `refusals` says which commands refused, and why."""

    folder: Path
    name: str
    faults: Faults
    refusals: dict[str, str]

    @property
    def odd(self) -> Odd:
        return NETWORKS[self.name]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "global.safetensors"

    @property
    def opened(self) -> tuple[object, ...]:
        """How the checkpoint is opened."""
        shape = "x".join(map(str, self.odd.shape))
        named = ("--model", "tests.support.odd_networks:make", "--model-arg", f"name={self.name}")
        tokens = ("--input-dtype", "int64") if self.odd.tokens else ()
        return (*named, "--input-shape", shape, "--classes", CLASSES, *tokens)

    def run(self, command: str, *arguments: object) -> bool:
        """Whether a command ended with 0; its faults and its refusal are noted."""
        said = run_here(command, *arguments)
        self.faults += complaint(said, (command, *arguments))
        if said.code != 0:
            self.refusals.setdefault(command, f"exit {said.code}: {said.error[-400:]}")
        return said.code == 0

    def must(self, faults: Faults, of: str) -> None:
        self.faults += [f"{self.name}, {of}: {fault}" for fault in faults]


def bench_of(name: str, folder: Path, seed: int = 0) -> Bench:
    """A checkpoint as anybody writes it, and labelled samples, in a folder."""
    bench = Bench(folder, name, [], {})
    torch.manual_seed(seed)
    model = make(name)
    samples = bench.odd.samples(2 * SAMPLES, seed + 1)
    model.eval()
    with torch.no_grad():
        model(samples[:2].clone())  # lazy layers get their weights
    state = {key: value.clone().contiguous() for key, value in model.state_dict().items() if torch.is_tensor(value)}
    save_file(state, bench.checkpoint)
    labels = np.arange(2 * SAMPLES) % CLASSES
    np.savez(folder / "data.npz", x=samples.numpy(), y=labels, classes=np.int64(CLASSES))
    return bench


@dataclass(frozen=True)
class Options:
    """How the commands are run on an odd network."""

    score: tuple[object, ...] = ()
    prune: tuple[object, ...] = ("--keep", 0.5, "--selection", "independent")
    train: tuple[object, ...] = ()
    reconstruct: tuple[object, ...] = ()
    onnx: bool = False

    @property
    def keeps_all(self) -> bool:
        return self.prune[:2] == ("--keep", 1.0)

    @property
    def recalibrates(self) -> bool:
        return "--recalibrate" in self.prune


def drawn_options(random: Random) -> Options:
    """Options that people give, in any combination."""
    score: list[object] = ["--criterion", random.choice([*["gate-ggn"] * 6, *CRITERIA])]
    score += random.choice([[], [], ["--top", random.randint(1, 5)], ["--draws", random.randint(1, 3)]])
    score += random.choice([[], [], ["--no-interactions"], ["--held-out", 0], ["--batch-size", random.randint(1, 9)]])
    budget = random.choice([("--keep", 1.0), ("--keep", 0.5), ("--keep", 0.3), ("--macs", 0.6), ("--params", 0.5)])
    prune: list[object] = list(budget)
    if random.random() < 0.5:
        prune += ["--calibration", random.choice(["DATA", "DATA[0:3]"]), "--rounds", random.randint(1, 3)]
        prune += random.choice([[], ["--no-compensate"], ["--recalibrate"], ["--reference", "labels"]])
        prune += random.choice([[], [], ["--selection", "quadratic"], ["--selection", "independent"]])
    else:
        prune += random.choice([["--selection", "independent"], ["--selection", "quadratic"], []])
    prune += random.choice([[], [], ["--min-width", 3], ["--exclude", "*enter*"], ["--profile", "raspberry-pi-4"]])
    train = random.choice([[], ["--augment"], ["--grad-clip", 0.5], ["--curvature", 4], ["--label-smoothing", 0.1]])
    rules = ["fill", "covered", "curvature", "trimmed-mean", "median"]
    return Options(
        tuple(score), tuple(prune), tuple(train), ("--rule", random.choice(rules)), onnx=random.random() < 0.7
    )


def through_every_command(bench: Bench, options: Options) -> Faults:
    """Score, prune, load, train, merge, and whether what was done is right. Returns: all faults."""
    data = f"npz:{bench.folder / 'data.npz'}"

    def filled(arguments: tuple[object, ...]) -> list[object]:
        return [a.replace("DATA", data) if isinstance(a, str) else a for a in arguments]

    scores, fleet = bench.folder / "scores.safetensors", bench.folder / "sub"
    counts = ("--samples", SAMPLES, "--held-out", SAMPLES)
    common = (*bench.opened, *QUIET)
    if bench.run("score", bench.checkpoint, *common, "--data", data, *counts, *filled(options.score), "-o", scores):
        bench.must(not_finite(load_file(scores)), "scores")
    elif not bench.run("score", bench.checkpoint, *common, "--criterion", "random", "--data", data, "-o", scores):
        return bench.faults
    asked = ("--scores", scores, *filled(options.prune), *(() if options.onnx else ("--no-onnx",)))
    if not bench.run("prune", bench.checkpoint, *common, *asked, "-o", fleet):
        return bench.faults
    whole = load_file(bench.checkpoint)
    for folder in [fleet] if (fleet / "report.json").exists() else sorted(fleet.iterdir()):
        if not options.recalibrates:
            bench.must(independent.faults_of_map(whole, folder), "index map")
            bench.must(faults_of_outputs(bench, whole, folder, options), "outputs")
        trained, merged = bench.folder / "trained", bench.folder / "merged.safetensors"
        own = (*bench.opened[:2], *QUIET, "--data", data, "--steps", 1, "--lr", 1e-3, "--no-onnx")
        is_trained = bench.run("train", folder, *own, *filled(options.train), "-o", trained)
        if not options.recalibrates and bench.run("reconstruct", bench.checkpoint, folder, "--quiet", "-o", merged):
            changed = independent.differing(whole, load_file(merged))
            bench.must([f"an untrained submodel changes {changed}"] if changed else [], "reconstruct")
            merged.unlink()
        if is_trained and bench.run(
            "reconstruct", bench.checkpoint, trained, *options.reconstruct, "--quiet", "-o", merged
        ):
            bench.must(faults_of_merge(whole, load_file(merged)), "merge")
    return bench.faults


def faults_of_outputs(bench: Bench, whole: independent.Tensors, folder: Path, options: Options) -> Faults:
    """The folder as commands load it, and its ONNX file, against the masked network in plain torch."""
    said = run_here(
        "evaluate", folder, *bench.opened[:2], "--data", f"npz:{bench.folder / 'data.npz'}", "--no-latency", "--json"
    )
    found = complaint(said, ("evaluate", folder))
    if said.code != 0:
        bench.refusals.setdefault("evaluate", f"exit {said.code}: {said.error[-400:]}")
        return found
    if not (bench.odd.exact or options.keeps_all):
        return found
    with np.load(bench.folder / "data.npz") as archive:
        x, y = torch.from_numpy(archive["x"]), torch.from_numpy(archive["y"])
    network = masked_network(bench, whole, folder)
    with torch.no_grad():
        loss = float(F.cross_entropy(next(independent.leaves(network(x))).double(), y))
    if not abs(said.json["loss"] - loss) <= 1e-4 * max(1.0, loss):
        found.append(f"a loss of {said.json['loss']:.6f}, and {loss:.6f} of the masked network")
    if (folder / "model.onnx").exists():
        network = masked_network(bench, whole, folder)
        found += independent.faults_of_onnx(folder / "model.onnx", network, bench.odd.samples)
    return found


def masked_network(bench: Bench, whole: independent.Tensors, folder: Path) -> torch.nn.Module:
    model = make(bench.name)
    with torch.no_grad():
        model.eval()(bench.odd.samples(2))
    return independent.masked(model, whole, folder)


def not_finite(tensors: independent.Tensors) -> Faults:
    wrong = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.double()).all()]
    return [f"not finite: {wrong}"] if wrong else []


def faults_of_merge(before: independent.Tensors, after: independent.Tensors) -> Faults:
    """A merged checkpoint has the same tensors; what was finite stays so."""
    if before.keys() != after.keys():
        return [f"other tensors: {sorted(before.keys() ^ after.keys())}"]
    found = []
    for name, tensor in before.items():
        if tensor.shape != after[name].shape or tensor.dtype != after[name].dtype:
            found.append(f"{name} became {after[name].dtype} {tuple(after[name].shape)}")
        elif not torch.isfinite(after[name][torch.isfinite(tensor)]).all():
            found.append(f"{name} is no longer finite")
    return found


# --- option values --------------------------------------------------------------------------------------------------

INTEGERS = (
    "-9223372036854775809",
    "-1",
    "0",
    "1",
    "2",
    "7",
    "2147483648",
    "9223372036854775808",
    "1" + 30 * "0",
    "1.5",
    "",
)
NUMBERS = ("-inf", "nan", "-1", "-0.0", "0", "1e-320", "0.3", "1", "1.5", "1e300", "inf", "1e999", "x", "")
TEXTS = (
    "", " ", "-", "0", "-1", "nan", "inf", "1e999", "0.5", "5ms", "2MB", "-3s", "1e400MB", "50%", "\x00", "\u00a0",
    "é" * 300, "a/b", "..", "/", "/dev/null", "*", "[", "[0:1]", "@train", "digits", "digits@test[5:2]", "npz:",
    "npz:/dev/null", "idx:.", "folder:.", "resnet20", "torchvision:", "timm:x", "os:getcwd", "os:nothing", "x.py:f",
    "1x1", "0x8x8", "1x8x8", "99999999999x9", "k=v", "=", "width=", "width=1e999", "width=-1", "linear", "quadratic",
    "labels", "int8", "fp16", "median", "0.0", "all", "auto", "cuda", "mps", "cpu:7", "fill", "covered", "gate-loss",
    "random", "int64", "float64", "jetson", "stm32h743", "raspberry-pi-4",
)  # fmt: skip
CRITERIA = (
    "gate-ggn", "gate-loss", "gate-fisher", "gate-magnitude", "gate-taylor", "gate-taylor-signed", "weight-fisher",
    "obd", "bn-scale", "lamp", "l1", "l2", "random",
)  # fmt: skip
DATA = ("digits", "digits@train", "digits@test[0:9]", "digits@train[3:4]", "digits@train[:12]", "digits[0:0]")
BUDGETS = ("0", "0.001", "0.3", "0.5", "0.999", "1", "1.0", "1.5", "1", "30M", "1e3", "-0.5")
USUAL = {
    "criterion": CRITERIA,
    "data": DATA,
    "test_data": DATA,
    "calibration": DATA,
    "keep": BUDGETS,
    "macs": BUDGETS,
    "params": BUDGETS,
    "latency": ("0ms", "1us", "5ms", "1s", "1h", "1e-9s"),
    "memory": ("0MB", "1B", "300KB", "64MB", "1e9GB"),
    "storage": ("0MB", "1B", "60KB", "2MB", "1e9GB"),
    "selection": ("auto", "linear", "quadratic", "independent"),
    "reference": ("network", "labels"),
    "profile": ("jetson", "stm32h743", "pi4", "raspberry-pi-4"),
    "dtype": ("fp32", "fp16", "int8"),
    "exclude": ("*", "layer1*", "fc", "nothing", "layer[12].*"),
    "rule": ("fill", "covered", "curvature", "trimmed-mean", "median"),
    "clip": ("median", "0", "1e-9", "1", "inf", "-1"),
    "weight": ("x=1", "trained=1", "=1", "trained=-1", "trained=inf"),
    "schedule": ("cosine", "constant"),
    "device": ("auto", "cpu", "cuda"),
    "input_dtype": ("float32", "int64"),
    "model": ("resnet20", "vgg11", "resnet18"),
    "model_arg": ("width=0.25", "width=0.5", "width=0", "more=1", "width=true", "width=1e9"),
    "input_shape": ("1x8x8", "3x8x8", "1x1x1", "8", "1x8x8x8", "1x100000x100000"),
}
"""What is typed when it is known what the option is for."""
SLOW = frozenset({"epochs", "steps", "rounds", "jobs", "draws"})
"""Options of which a large value is right and takes its time."""
WRITTEN = ("new.json", "no/such/folder.json", ".", "data.npz", "")


@dataclass(frozen=True)
class Option:
    """An option as it is typed, and what may be typed after it; nothing after a flag. bounded: unless it is a whole
    number without a least or a largest value."""

    words: tuple[str, ...]
    values: tuple[str, ...]
    bounded: bool = True


def commands() -> dict[str, list[Option]]:
    """The options of every command but `--output`, from the functions that Typer was given."""
    found = {}
    for group, prefix in ((app, ""), *((g.typer_instance, f"{g.name} ") for g in app.registered_groups)):
        for command in group.registered_commands if group is not None else ():
            function = command.callback
            assert function is not None
            name = prefix + (command.name or function.__name__.replace("_", "-"))
            hints = typing.get_type_hints(function, include_extras=True)
            found[name] = [
                made for key, hint in hints.items() if key not in ("return", "output") and (made := option(key, hint))
            ]
    return found


def option(name: str, hint: Any) -> Option | None:
    """None for an argument, which is not typed with a name."""
    kind, *notes = typing.get_args(hint)
    info = notes[0]
    if not isinstance(info, OptionInfo):
        return None
    given = [*(info.param_decls or ()), info.default]  # Typer puts the first of an annotated option's names there
    words = tuple(word for text in given if isinstance(text, str) for word in text.split("/"))
    words = words or (f"--{name.replace('_', '-')}",)
    kinds = {kind, *typing.get_args(kind)}
    if bool in kinds:
        return Option(words, ())
    if int in kinds:
        values = ("-1", "0", "1", "2", "x", "1.5") if name in SLOW else INTEGERS
        return Option(words, values, bounded=None not in (info.min, info.max))
    if float in kinds:
        return Option(words, NUMBERS)
    if Path in kinds and name not in ("scores", "before", "maps", "data_root"):
        return Option(words, WRITTEN)
    return Option(words, (*TEXTS, *USUAL.get(name, ()) * 9))


def drawn_command(random: Random, right: dict[str, list[str]]) -> list[str]:
    """A command that is right (`right` has one a command) with one to three options more, or with other values."""
    name = random.choice(sorted(right))
    every = commands()[name]
    more: list[str] = []
    for each in random.sample(every, min(len(every), random.randint(1, 3))):
        more += [random.choice(each.words), *([random.choice(each.values)] if each.values else [])]
    return [*name.split(), *right[name], *more]


# --- damaged files --------------------------------------------------------------------------------------------------


def damaged(path: Path, random: Random) -> str:
    """Damage a file in place. Returns: how."""
    content = bytearray(path.read_bytes())
    ways: list[Callable[[bytearray, Random], str]] = [flipped, cut_off, extended, overwritten]
    if path.suffix == ".safetensors":
        ways += [changed_header] * 6
    if path.suffix == ".json":
        ways += [changed_json] * 6
    how = random.choice(ways)(content, random)
    path.write_bytes(content)
    return how


def flipped(content: bytearray, random: Random) -> str:
    early = min(len(content), 400)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(random.choice([early, len(content)]) or 1)
        if content:
            content[at] ^= 1 << random.randrange(8)
    return "bits flipped"


def cut_off(content: bytearray, random: Random) -> str:
    del content[random.choice([0, 1, 8, 9, random.randrange(len(content) + 1), max(0, len(content) - 1)]) :]
    return "cut off"


def extended(content: bytearray, random: Random) -> str:
    content += random.choice([b"\0", b"x" * 100, b"{}", b"\n"])
    return "extended"


def overwritten(content: bytearray, random: Random) -> str:
    at = random.randrange(len(content) + 1)
    content[at : at + 8] = random.choice([b"\xff" * 8, b"\0" * 8, struct.pack("<d", float("nan"))])
    return "eight bytes overwritten"


def changed_json(content: bytearray, random: Random) -> str:
    try:
        value = json.loads(bytes(content))
    except ValueError:
        return flipped(content, random)
    how = changed(value, random)
    content[:] = json.dumps(value).encode()
    return how


def changed_header(content: bytearray, random: Random) -> str:
    """A safetensors file whose structure stays valid, with one value in its header or in our record changed."""
    if len(content) < 8:
        return flipped(content, random)
    (length,) = struct.unpack("<Q", content[:8])
    try:
        header = json.loads(bytes(content[8 : 8 + length]))
        ours = "cahfp" in header.get("__metadata__", {}) and random.random() < 0.8
        target = json.loads(header["__metadata__"]["cahfp"]) if ours else header
    except (ValueError, AttributeError, KeyError):
        return flipped(content, random)
    how = changed(target, random)
    if ours:
        header["__metadata__"]["cahfp"] = json.dumps(target)
    text = json.dumps(header).encode()
    content[: 8 + length] = struct.pack("<Q", len(text)) + text
    return f"{'our record' if ours else 'header'}: {how}"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any, str]]:
    """Every (container, key) in a JSON value, with its path in words."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(pairs):
        yield value, key, ".".join(map(str, (*path, key)))
        yield from places(child, (*path, key))


STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, "", "x", "NaN", "\u0000", "../../x",
    "os:getcwd", [], {}, [0], [[0]], {"a": 1}, "F32", "I64", "BF16", "F8_E8M0", [1, 1], ["a", None],
)  # fmt: skip


def changed(value: Any, random: Random) -> str:
    """Change one place in a JSON value."""
    found = list(places(value))
    if not found:
        return "nothing to change"
    container, key, words = random.choice(found)
    way = random.choice(["strange", "strange", "strange", "near", "removed", "added"])
    if way == "removed":
        del container[key]
    elif way == "added":
        if isinstance(container, dict):
            container["more"] = random.choice(STRANGE)
        else:
            container.append(random.choice(STRANGE))
    elif way == "near" and isinstance(container[key], int | float) and not isinstance(container[key], bool):
        container[key] += random.choice([-1, 1, 0.5])
    else:
        container[key] = random.choice(STRANGE)
    return f"{words} {way}"


@dataclass(frozen=True)
class Fleet:
    """Good files of one small network, to take copies of: see `good_files`."""

    folder: Path

    def copied(self, to: Path) -> "Fleet":
        shutil.copytree(self.folder, to)
        return Fleet(to)

    def right(self) -> dict[str, list[str]]:
        """A command line that is right for every command, in this folder."""
        at = {path.name: str(path) for path in self.folder.iterdir()}
        data = ["--data", f"npz:{at['data.npz']}"]
        quick = ["--threads", "1", "--quiet"]
        whole, sub, out = at["global.safetensors"], at["sub"], str(self.folder / "out")
        counts = ["--samples", "8", "--held-out", "8"]
        return {
            "score": [whole, *data, *counts, *quick, "-o", f"{out}.safetensors"],
            "prune": [
                *(whole, "--scores", at["scores.safetensors"], "--keep", "0.5", "--no-onnx", *quick, "-o", out),
            ],
            "evaluate": [sub, *data, "--no-latency", *quick],
            "train": [sub, *data, "--steps", "1", "--no-onnx", *quick, "-o", out],
            "reconstruct": [whole, at["trained"], "--quiet", "-o", f"{out}.safetensors"],
            "inspect": [whole],
            "profile list": [],
            "profile show": ["raspberry-pi-4"],
            "profile predict": [whole, "--profile", "raspberry-pi-4"],
        }

    def readers(self) -> dict[str, list[list[str]]]:
        """The commands that read each file."""
        right = self.right()
        line = {name: [*name.split(), *words] for name, words in right.items()}
        sub, trained, whole = self.folder / "sub", self.folder / "trained", self.folder / "global.safetensors"

        def inspect(path: Path) -> list[str]:
            return ["inspect", str(path)]

        found = {
            "global.safetensors": [line["score"], line["prune"], line["reconstruct"], line["inspect"]],
            "scores.safetensors": [line["prune"], inspect(self.folder / "scores.safetensors")],
            "data.npz": [line["score"], line["train"], line["evaluate"]],
            "part.partial.safetensors": [
                [
                    "reconstruct",
                    str(whole),
                    str(self.folder / "part.partial.safetensors"),
                    "-o",
                    f"{self.folder}/o.safetensors",
                ],
                inspect(self.folder / "part.partial.safetensors"),
            ],
        }
        for name in ("submodel.safetensors", "index_map.safetensors", "report.json", "curvature.safetensors"):
            merge = [
                "reconstruct",
                str(whole),
                str(trained),
                "--rule",
                "curvature",
                "-o",
                f"{self.folder}/o.safetensors",
            ]
            found[f"trained/{name}"] = [merge, inspect(trained), inspect(trained / name)]
            if (sub / name).exists():
                found[f"sub/{name}"] = [line["evaluate"], line["train"], inspect(sub)]
        if (sub / "model.onnx").exists():
            found["sub/model.onnx"] = [["evaluate", str(sub / "model.onnx"), *right["evaluate"][1:]], inspect(sub)]
        return found


def good_files(folder: Path, onnx: bool = True) -> Fleet:
    """A checkpoint that records its network, and everything that the commands make of it."""
    random = np.random.default_rng(0)
    x, y = random.random((2 * SAMPLES, 1, 8, 8)).astype(np.float32), np.arange(2 * SAMPLES) % CLASSES
    np.savez(folder / "data.npz", x=x, y=y, classes=np.int64(CLASSES))
    data = ("--data", f"npz:{folder / 'data.npz'}")
    whole, scores = folder / "global.safetensors", folder / "scores.safetensors"
    network = ("--model", "resnet20", "--model-arg", "width=0.25")
    exported = () if onnx else ("--no-onnx",)
    steps = (
        ("train", *network, *data, "--steps", 2, *QUIET, "-o", whole),
        ("score", whole, *data, "--samples", SAMPLES, "--held-out", 0, *QUIET, "-o", scores),
        ("prune", whole, "--scores", scores, "--keep", 0.5, *QUIET, *exported, "-o", folder / "sub"),
        (
            *("train", folder / "sub", *data, "--steps", 1, "--curvature", 8, "--no-onnx", *QUIET),
            *("-o", folder / "trained"),
        ),
        ("reconstruct", whole, folder / "trained", "--partial", "--quiet", "-o", folder / "part.partial.safetensors"),
    )
    for step in steps:
        said = run_here(*step)
        assert said.code == 0, f"{step}: {said.stderr}"
    return Fleet(folder)


def with_damage(fleet: Fleet, random: Random, to: Path) -> Faults:
    """Damage one file of a copy of a fleet and run a command that reads it."""
    copy = fleet.copied(to)
    name = random.choice(sorted(copy.readers()))
    how = damaged(copy.folder / name, random)
    command = random.choice(copy.readers()[name])
    said = run_here(*command)
    found = [f"{name} ({how}): {fault}" for fault in complaint(said, command)]
    merged = copy.folder / "o.safetensors"
    if said.code == 0 and command[0] == "reconstruct" and merged.exists() and name != "global.safetensors":
        whole = load_file(copy.folder / "global.safetensors")
        found += [f"{name} ({how}): {fault}" for fault in faults_of_merge(whole, load_file(merged))]
    return found


def with_options(fleet: Fleet, random: Random, to: Path) -> Faults:
    """Run a command of a copy of a fleet with drawn options."""
    copy = fleet.copied(to)
    command = drawn_command(random, copy.right())
    return complaint(run_here(*command), command)


def with_odd_network(random: Random, to: Path) -> Faults:
    """Take an odd network through every command, with drawn options."""
    bench = bench_of(random.choice(sorted(NETWORKS)), to, random.randrange(1000))
    options = drawn_options(random)
    return [f"{bench.name} {options}: {fault}" for fault in through_every_command(bench, options)]
