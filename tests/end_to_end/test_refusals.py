"""Bad input, one row a case: the documented exit code, a short message with the culprit and the remedy, no output."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.support import damage
from tests.support.commands import run, run_well
from tests.support.fleet import MODEL, Clients, Fleet

Arguments = list[object]
FOREIGN = [*MODEL, "--input-shape", "1x8x8", "--classes", "10"]
PROFILE = Path(__file__).parents[2] / "profiles" / "stm32h743.toml"
DAMAGES: dict[str, Callable[[Path, Path], Path]] = {
    "truncated": damage.truncated,
    "lying": damage.lying,
    "without_tensor": damage.without_tensor,
    "reshaped": damage.reshaped,
    "nan": damage.with_value(np.nan),
    "inf": damage.with_value(-np.inf),
}


@dataclass(frozen=True)
class Bench:
    """Where a row makes its bad input, `folder`, and what is good."""

    folder: Path
    fleet: Fleet
    clients: Clients

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def marker(self) -> Path:
        return self.folder / "marker"

    def bad(self, how: str, source: Path | None = None) -> Path:
        """The global checkpoint (or `source`), damaged."""
        return DAMAGES[how](source or self.fleet.checkpoint, self.folder / "bad.safetensors")

    def client(self, how: str | None = None, file: str = "submodel.safetensors") -> Path:
        """A trained submodel folder of its own, with one file damaged."""
        folder = self.folder / "client"
        shutil.copytree(self.clients.folders["stm32h743"], folder)
        if how is not None:
            DAMAGES[how](self.clients.folders["stm32h743"] / file, folder / file)
        return folder

    def client_with_indices(self, change: Callable[[np.ndarray], None]) -> Path:
        """A submodel folder whose index map has one array changed."""
        folder = self.client()

        def edit(tensors: damage.Tensors, record: dict) -> None:
            change(next(array for array in tensors.values() if len(array) > 2))

        source = self.clients.folders["stm32h743"] / "index_map.safetensors"
        damage.rewritten(source, folder / "index_map.safetensors", edit)
        return folder

    def other_checkpoint(self) -> Path:
        """The same tensors but for one number: another digest."""
        return damage.rewritten(
            self.fleet.checkpoint,
            self.folder / "other.safetensors",
            lambda tensors, record: tensors["fc.bias"].__setitem__(0, 7.0),
        )

    def profile(self, old: str, new: str) -> Path:
        text = PROFILE.read_text()
        assert old in text
        path = self.folder / "board.toml"
        path.write_text(text.replace(old, new, 1))
        return path

    def data(self, **how: object) -> str:
        return f"npz:{damage.npz(self.folder / 'data.npz', **how)}"

    def prune(self, *arguments: object) -> Arguments:
        return ["prune", self.fleet.checkpoint, "--scores", self.fleet.scores, *arguments, "-o", self.out]

    def score(self, checkpoint: Path | None = None, *arguments: object) -> Arguments:
        return ["score", checkpoint or self.fleet.checkpoint, "--samples", "8", *arguments, "-o", self.out]

    def evaluate(self, network: Path | None = None, *arguments: object) -> Arguments:
        return ["evaluate", network or self.fleet.checkpoint, "--no-latency", *arguments]

    def train(self, *arguments: object) -> Arguments:
        return ["train", *arguments, "-o", self.out]

    def reconstruct(self, *folders: Path, checkpoint: Path | None = None) -> Arguments:
        return ["reconstruct", checkpoint or self.fleet.checkpoint, *folders, "-o", self.out]

    def existing(self, content: bytes = b"mine") -> Path:
        self.out.write_bytes(content)
        return self.out

    def existing_folder(self) -> Path:
        self.out.mkdir()
        (self.out / "mine.txt").write_text("mine")
        return self.out


Row = tuple[str, int, Callable[[Bench], Arguments], tuple[str, ...]]
AGAIN = "bad.safetensors"

CHECKPOINTS: list[Row] = [
    ("evaluate truncated", 3, lambda b: b.evaluate(b.bad("truncated")), (AGAIN, "Copy or make the file again")),
    ("evaluate offsets lie", 3, lambda b: b.evaluate(b.bad("lying")), (AGAIN, "Copy or make the file again")),
    ("evaluate tensor missing", 3, lambda b: b.evaluate(b.bad("without_tensor")), (AGAIN, damage.WEIGHT, "Check --")),
    ("evaluate wrong shape", 3, lambda b: b.evaluate(b.bad("reshaped")), (AGAIN, damage.WEIGHT, "Check --model")),
    ("evaluate NaN", 3, lambda b: b.evaluate(b.bad("nan")), (AGAIN, damage.WEIGHT, "NaN", "Train again")),
    ("evaluate Inf in submodel", 3, lambda b: b.evaluate(b.client("inf")), ("client", damage.WEIGHT, "Train again")),
    ("score NaN", 3, lambda b: b.score(b.bad("nan")), (AGAIN, damage.WEIGHT, "NaN", "Train again")),
    ("score truncated", 3, lambda b: b.score(b.bad("truncated")), (AGAIN, "Copy or make the file again")),
    (
        "prune Inf",
        3,
        lambda b: ["prune", b.bad("inf"), "--scores", b.fleet.scores, "--keep", "0.5", "-o", b.out],
        (AGAIN, damage.WEIGHT, "Inf", "Train again"),
    ),
    (
        "prune with another checkpoint's scores",
        3,
        lambda b: ["prune", b.other_checkpoint(), "--scores", b.fleet.scores, "--keep", "0.5", "-o", b.out],
        ("scores.safetensors", "other.safetensors", "Score again: cahfp score"),
    ),
    (
        "prune truncated scores",
        3,
        lambda b: [
            *("prune", b.fleet.checkpoint, "--keep", "0.5", "-o", b.out),
            *("--scores", b.bad("truncated", b.fleet.scores)),
        ],
        (AGAIN, "Copy or make the file again"),
    ),
    ("train NaN", 3, lambda b: b.train(b.bad("nan")), (AGAIN, damage.WEIGHT, "NaN", "earlier checkpoint")),
    ("inspect truncated", 3, lambda b: ["inspect", b.bad("truncated")], (AGAIN, "Copy or make the file again")),
    ("inspect offsets lie", 3, lambda b: ["inspect", b.bad("lying")], (AGAIN, "Copy or make the file again")),
    (
        "missing checkpoint",
        3,
        lambda b: b.evaluate(b.folder / "none.safetensors"),
        ("none.safetensors", "no such file"),
    ),
    ("missing .pt", 3, lambda b: b.evaluate(b.folder / "none.pt", *FOREIGN), ("none.pt", "no such file")),
    ("missing onnx", 3, lambda b: b.evaluate(b.folder / "none.onnx"), ("none.onnx", "no such file")),
    ("missing to inspect", 3, lambda b: ["inspect", b.folder / "none"], ("none", "no such file")),
    (
        "missing scores",
        3,
        lambda b: ["prune", b.fleet.checkpoint, "--scores", b.folder / "none", "--keep", "0.5", "-o", b.out],
        ("none", "no such file"),
    ),
    ("folder that is no submodel", 3, lambda b: b.evaluate(b.folder), ("submodel.safetensors", "cahfp prune")),
    ("score a submodel", 2, lambda b: b.score(b.fleet.submodels["stm32h743"]), ("stm32h743", "global checkpoint")),
    (
        "foreign checkpoint without model",
        2,
        lambda b: b.evaluate(foreign(b)),
        ("foreign.safetensors", "--model", "--input-shape"),
    ),
]

RECONSTRUCT: list[Row] = [
    ("global truncated", 3, lambda b: b.reconstruct(b.client(), checkpoint=b.bad("truncated")), (AGAIN, "again")),
    ("global NaN", 3, lambda b: b.reconstruct(b.client(), checkpoint=b.bad("nan")), (AGAIN, damage.WEIGHT)),
    (
        "client of another global",
        3,
        lambda b: b.reconstruct(b.client(), checkpoint=b.other_checkpoint()),
        ("client", "another checkpoint", "Prune again from", "other.safetensors"),
    ),
    ("client truncated", 3, lambda b: b.reconstruct(b.client("truncated")), ("client/submodel", "again")),
    ("client offsets lie", 3, lambda b: b.reconstruct(b.client("lying")), ("client/submodel", "again")),
    (
        "client tensor missing",
        3,
        lambda b: b.reconstruct(b.client("without_tensor")),
        ("client", damage.WEIGHT, "Send"),
    ),
    ("client wrong shape", 3, lambda b: b.reconstruct(b.client("reshaped")), ("client", damage.WEIGHT, "Send back")),
    ("client NaN", 3, lambda b: b.reconstruct(b.client("nan")), ("client", damage.WEIGHT, "train it again")),
    ("client Inf", 3, lambda b: b.reconstruct(b.client("inf")), ("client", damage.WEIGHT, "train it again")),
    (
        "index out of range",
        3,
        lambda b: b.reconstruct(b.client_with_indices(lambda indices: indices.__setitem__(-1, 5000))),
        ("client/index_map.safetensors", "5000", "prune again"),
    ),
    (
        "index negative",
        3,
        lambda b: b.reconstruct(b.client_with_indices(lambda indices: indices.__setitem__(0, -1))),
        ("client/index_map.safetensors", "-1", "prune again"),
    ),
    (
        "index repeated",
        3,
        lambda b: b.reconstruct(b.client_with_indices(lambda indices: indices.__setitem__(1, indices[0]))),
        ("client/index_map.safetensors", "repeated", "prune again"),
    ),
    ("unknown rule", 2, lambda b: [*b.reconstruct(b.client()), "--rule", "mean"], ("mean", "fill, covered")),
    ("weight garbage", 2, lambda b: [*b.reconstruct(b.client()), "--weight", "x=lots"], ("--weight", "DIR=N")),
    ("no clients", 2, lambda b: b.reconstruct(), ("SUBMODEL_DIR", "--help")),
    ("client missing", 3, lambda b: b.reconstruct(b.folder / "nobody"), ("nobody", "no such file")),
    (
        "train on a map out of range",
        3,
        lambda b: b.train(b.client_with_indices(lambda indices: indices.__setitem__(-1, 5000))),
        ("client/index_map.safetensors", "5000", "prune again"),
    ),
]

DATA: list[Row] = [
    ("evaluate shape", 3, lambda b: b.evaluate(None, "--data", b.data(shape=(1, 9, 9))), ("1x9x9", "1x8x8", "Use the")),
    ("evaluate classes", 3, lambda b: b.evaluate(None, "--data", b.data(classes=12)), ("data.npz", "12", "10")),
    (
        "evaluate onnx shape",
        3,
        lambda b: b.evaluate(b.clients.folders["stm32h743"] / "model.onnx", "--data", b.data(shape=(3, 8, 8))),
        ("3x8x8", "1x8x8"),
    ),
    ("train shape", 3, lambda b: b.train(b.fleet.checkpoint, "--data", b.data(shape=(3, 8, 8))), ("3x8x8", "1x8x8")),
    ("train classes", 3, lambda b: b.train(b.client(), "--data", b.data(classes=11)), ("data.npz", "11", "10")),
    ("too small for the model", 2, lambda b: b.train(*MODEL, "--data", b.data(shape=(1, 4, 4))), ("1x4x4", "8 pixels")),
    ("score shape", 3, lambda b: b.score(None, "--data", b.data(shape=(1, 8, 9))), ("1x8x9", "1x8x8")),
    ("data missing", 3, lambda b: b.train(*MODEL, "--data", "npz:none.npz"), ("none.npz", "no such file")),
    ("data unknown", 2, lambda b: b.train(*MODEL, "--data", "digit"), ("digit", "Did you mean 'digits'")),
    ("data slice beyond", 3, lambda b: b.train(*MODEL, "--data", "digits[0:99999]"), ("99999", "1442")),
    ("data slice garbage", 2, lambda b: b.score(None, "--data", "digits[a:b]"), ("digits[a:b]", "[first:last]")),
    ("split unknown", 2, lambda b: b.evaluate(None, "--data", "digits@val"), ("@train or @test",)),
    (
        "fashion-mnist missing",
        3,
        lambda b: b.train(*MODEL, "--data", "fashion-mnist", "--data-root", b.folder),
        ("fashion-mnist", "--data-root"),
    ),
]

NAMES: list[Row] = [
    ("model unknown", 2, lambda b: b.train("--model", "resnet2"), ("resnet2", "Did you mean", "resnet20")),
    ("model argument unknown", 2, lambda b: b.train(*MODEL, "--model-arg", "depth=3"), ("depth", "width")),
    ("no model at all", 2, lambda b: b.train(), ("CHECKPOINT", "--model")),
    ("criterion unknown", 2, lambda b: b.score(None, "--criterion", "gate-gn"), ("gate-gn", "gate-ggn")),
    ("device unknown", 2, lambda b: b.evaluate(None, "--device", "tpu"), ("tpu", "auto, cpu, cuda, mps")),
    ("schedule unknown", 2, lambda b: b.train(*MODEL, "--schedule", "step"), ("--schedule", "cosine or constant")),
    ("command unknown", 2, lambda b: ["purne"], ("purne", "cahfp --help")),
    ("option unknown", 2, lambda b: b.prune("--budget", "3"), ("--budget", "--help")),
    ("profile unknown", 2, lambda b: b.prune("--profile", "jetsn"), ("jetsn", "did you mean 'jetson", ".toml")),
    ("profile unknown in show", 2, lambda b: ["profile", "show", "stm32h74"], ("stm32h74", "did you mean 'stm32h7")),
    ("profile file missing", 3, lambda b: b.prune("--profile", "none.toml"), ("none.toml", "cahfp profile list")),
    (
        "profile with a typo in a key",
        3,
        lambda b: b.prune("--profile", b.profile("bandwidth =", "bandwith =")),
        ("board.toml", "bandwith", "bandwidth"),
    ),
    (
        "profile with a negative figure",
        3,
        lambda b: b.prune("--profile", b.profile("value = 0.96", "value = -0.96")),
        ("board.toml", "compute.fp32.peak"),
    ),
    ("profile that is no TOML", 3, lambda b: b.prune("--profile", b.profile("[runtime]", "[runtime")), ("board.toml",)),
    ("profile twice", 2, lambda b: b.prune("--profile", "pi4", "--profile", "pi4"), ("raspberry-pi-4", "twice")),
    (
        "profile twice by an alias",
        2,
        lambda b: b.prune("--profile", "stm32", "--profile", "stm32h743"),
        ("stm32h743", "twice"),
    ),
]

QUANTITIES: list[Row] = [
    ("latency without a device", 2, lambda b: b.prune("--latency", "5ms"), ("--latency", "--profile")),
    ("nothing that must hold", 2, lambda b: b.prune(), ("--profile", "--keep 0.5")),
    *[
        (
            f"{flag} {text!r}",
            2,
            lambda b, flag=flag, text=text: b.prune("--profile", "pi4", f"{flag}={text}"),
            (flag, text, example),
        )
        for flag, example, texts in (
            ("--latency", "5ms", ("0", "-5ms", "5 parsecs", "", "nan")),
            ("--memory", "64MB", ("0MB", "-1", "lots")),
            ("--storage", "64MB", ("0", "1e999GB", "2MBs")),
            ("--macs", "0.5", ("0", "-0.5", "1.5")),
            ("--params", "0.5", ("0", "1/2", "")),
            ("--keep", "0.5", ("0", "1.5", "-0.5", "half")),
        )
        for text in texts
    ],
    *[
        (" ".join(options), 2, lambda b, options=options: b.train(*MODEL, *options), (options[0],))
        for options in (
            ("--epochs", "0"),
            ("--epochs", "many"),
            ("--batch-size", "-1"),
            ("--seed", "-1"),
            ("--threads", "0"),
            ("--lr", "0"),
            ("--lr", "nan"),
            ("--input-shape", "8by8"),
        )
    ],
    ("--samples 0", 2, lambda b: b.score(None, "--samples", "0"), ("--samples",)),
]

OUTPUTS: list[Row] = [
    ("train exists", 3, lambda b: [*b.train(*MODEL)[:-1], b.existing()], ("out", "--force")),
    ("score exists", 3, lambda b: [*b.score()[:-1], b.existing()], ("out", "--force")),
    ("reconstruct exists", 3, lambda b: [*b.reconstruct(b.client())[:-1], b.existing()], ("out", "--force")),
    ("prune exists", 3, lambda b: [*b.prune("--keep", "0.5")[:-1], b.existing_folder()], ("out", "--force")),
    ("client exists", 3, lambda b: [*b.train(b.client())[:-1], b.existing_folder()], ("out", "--force")),
    (
        "prune does not replace a folder that is not ours",
        3,
        lambda b: [*b.prune("--keep", "0.5", "--force")[:-1], b.existing_folder()],
        ("out", "not an output of cahfp", "another output"),
    ),
    (
        "train does not replace a folder",
        3,
        lambda b: [*b.train(*MODEL, "--force")[:-1], b.existing_folder()],
        ("out", "name a file"),
    ),
    *[
        (f"{name} {where}", 3, lambda b, make=make, where=where: [*make(b)[:-1], place(b, where)], (word,))
        for name, make in (
            ("train", lambda b: b.train(*MODEL)),
            ("score", lambda b: b.score()),
            ("prune", lambda b: b.prune("--keep", "0.5")),
            ("prune for devices", lambda b: b.prune("--profile", "pi4")),
            ("client", lambda b: b.train(b.client())),
            ("reconstruct", lambda b: b.reconstruct(b.client())),
        )
        for where, word in (("below a file", "not a folder"), ("in a missing folder", "create it first"))
    ],
    (
        "reconstruct into /proc",
        3,
        lambda b: [*b.reconstruct(b.client())[:-1], "/proc/out"],
        ("/proc", "another output"),
    ),
]


def foreign(b: Bench) -> Path:
    from safetensors.numpy import load_file, save_file

    path = b.folder / "foreign.safetensors"
    save_file(load_file(b.fleet.checkpoint), path)
    return path


def place(b: Bench, where: str) -> Path:
    """An output that cannot be written, not even by root."""
    if where == "below a file":
        (b.folder / "file").write_text("not a folder")
        return b.folder / "file" / "out"
    return b.folder / "missing" / "out"


@pytest.fixture
def bench(fleet: Fleet, clients: Clients, tmp_path: Path) -> Bench:
    return Bench(tmp_path, fleet, clients)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(bench: Bench, code: int, arguments: Arguments, words: tuple[str, ...]) -> str:
    """Run a command that must fail; the message."""
    before = contents(bench.folder)
    done = run(*arguments, cwd=bench.folder)
    assert done.code == code, done.stderr
    assert done.stdout == ""
    assert contents(bench.folder) == before
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.strip()]) <= 3, done.stderr
    missing = [word for word in words if word not in done.stderr]
    assert not missing, f"{missing} not in: {done.stderr}"
    return done.stderr


@pytest.mark.parametrize(
    ("code", "make", "words"),
    [pytest.param(*row[1:], id=row[0]) for row in (*CHECKPOINTS, *RECONSTRUCT, *DATA, *NAMES, *QUANTITIES, *OUTPUTS)],
)
def test_is_refused_with_the_culprit_and_the_remedy_and_nothing_is_written(
    bench: Bench, code: int, make: Callable[[Bench], Arguments], words: tuple[str, ...]
) -> None:
    refused(bench, code, make(bench), words)


IMPOSSIBLE = {"latency": "1us", "memory": "1KB", "storage": "1KB", "macs": "10", "params": "10"}
REACHABLE = re.compile(r"(\w+) [\d.]+ ?\w* \(smallest reachable: ([^)]+)\)")


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_budget_below_one_channel_a_layer_exits_with_4_and_says_what_is_reachable(bench: Bench, name: str) -> None:
    arguments = bench.prune("--profile", "stm32", f"--{name}", IMPOSSIBLE[name])
    message = refused(bench, 4, arguments, ("stm32h743", name, "smallest reachable", "Raise the budget"))
    assert [found[0] for found in REACHABLE.findall(message)] == [name]


def test_the_stated_smallest_budgets_passed_back_succeed_and_hold(bench: Bench) -> None:
    flags = [part for name, value in IMPOSSIBLE.items() for part in (f"--{name}", value)]
    message = refused(bench, 4, bench.prune("--profile", "stm32", *flags), ("smallest reachable",))
    stated = dict(REACHABLE.findall(message))
    assert stated.keys() == IMPOSSIBLE.keys()
    flags = [part for name, value in stated.items() for part in (f"--{name}", value)]
    run_well(*bench.prune("--profile", "stm32", *flags, "--threads", "1"))
    report = json.loads((bench.out / "stm32h743" / "report.json").read_text())
    assert {family["kept"] for family in report["widths"]} == {1}
    assert (bench.out / "stm32h743" / "model.onnx").stat().st_size <= report["budget"]["limits"]["storage"]


PICKLES: dict[str, Callable[[Path, Path], Path]] = {
    "weights.safetensors": damage.pickled,
    "archive.safetensors": damage.torch_archive,
    "archive.pt": damage.torch_archive,
    "weights.pth": damage.pickled,
}


@pytest.mark.parametrize("command", ["evaluate", "inspect", "reconstruct"])
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_where_weights_are_expected_is_refused_and_never_run(bench: Bench, name: str, command: str) -> None:
    path = PICKLES[name](bench.folder / name, bench.marker)
    arguments = {
        "evaluate": bench.evaluate(path, *FOREIGN),
        "inspect": ["inspect", path],
        "reconstruct": bench.reconstruct(bench.clients.folders["stm32h743"], checkpoint=path),
    }[command]
    refused(bench, 3, arguments, (name, "pickle"))
    assert not bench.marker.exists()


def test_the_traps_of_these_tests_would_spring(bench: Bench) -> None:
    import pickle

    pickle.loads(damage.pickled(bench.folder / "x", bench.marker).read_bytes())
    assert bench.marker.is_dir()


def test_data_with_a_pickle_in_it_is_refused_and_never_run(bench: Bench) -> None:
    data = damage.trapped_npz(bench.folder / "trap.npz", bench.marker)
    refused(bench, 3, bench.train(*MODEL, "--data", f"npz:{data}"), ("trap.npz", "plain arrays", "numpy.savez"))
    assert not bench.marker.exists()


@pytest.mark.parametrize("spec", ["evil.py:make", "evil:make"])
@pytest.mark.parametrize("kind", ["checkpoint", "submodel"])
def test_a_file_that_names_code_as_its_model_does_not_get_it_run(bench: Bench, kind: str, spec: str) -> None:
    code = f"from pathlib import Path\nPath({str(bench.marker)!r}).mkdir()\ndef make(**any): raise SystemExit('ran')\n"
    (bench.folder / "evil.py").write_text(code)

    def name_code(tensors: damage.Tensors, record: dict) -> None:
        record["model"] = {"spec": spec, "args": {}}

    if kind == "checkpoint":
        network = damage.rewritten(bench.fleet.checkpoint, bench.folder / "trojan.safetensors", name_code)
    else:
        network = bench.client()
        source = bench.clients.folders["stm32h743"] / "submodel.safetensors"
        damage.rewritten(source, network / "submodel.safetensors", name_code)
    refused(bench, 2, bench.evaluate(network), (spec, "If you trust that code, pass --model"))
    assert not bench.marker.exists()
    if (kind, spec) == ("checkpoint", "evil.py:make"):  # asked for by the user it runs, so the trap is a real one
        assert run(*bench.evaluate(network, "--model", spec), cwd=bench.folder).code == 3
        assert bench.marker.is_dir()


def test_reconstruct_and_inspect_need_no_model_code_and_run_none(bench: Bench) -> None:
    (bench.folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(bench.marker)!r}).mkdir()\n")
    trojan = damage.rewritten(
        bench.fleet.checkpoint,
        bench.folder / "trojan.safetensors",
        lambda tensors, record: record.update(model={"spec": "evil.py:make", "args": {}}),
    )
    run_well("inspect", trojan, cwd=bench.folder)
    run_well(*bench.reconstruct(bench.client(), checkpoint=trojan), cwd=bench.folder)
    assert not bench.marker.exists()
