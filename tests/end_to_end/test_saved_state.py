"""What a checkpoint can hold is known before work starts; infinite constants, complex weights and recorded arguments go
through every command."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from tests.support.commands import Done, run_here

CODE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, act="relu", **state):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.act = getattr(torch, act)

    def forward(self, x):
        return self.head(self.act(self.first(x)))


class Masked(Net):
    def __init__(self):
        super().__init__()
        mask = torch.zeros(8)
        mask[::3] = -torch.inf
        self.register_buffer("mask", mask)

    def forward(self, x):
        return self.head(self.act(self.first(x)) * self.mask.exp())


class Complex(Net):
    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.ones(4, dtype=torch.cfloat))

    def forward(self, x):
        return super().forward(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=6))


class Double(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("wide", torch.zeros(2, dtype=torch.complex128))


class Named(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("line\\nbreak", torch.zeros(2))


class Extra(Net):
    def get_extra_state(self):
        return {"version": 2}

    def set_extra_state(self, state):
        pass


class ExtraTensor(Net):
    version = torch.ones(3)

    def get_extra_state(self):
        return self.version

    def set_extra_state(self, state):
        self.version = state


class Overflowing(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.seen += torch.inf
        return super().forward(x)


def beside(buffer):
    net = Net()
    net.register_buffer("odd", buffer)
    return net


def empty():
    return beside(torch.zeros(0, 4))


def expanded():
    return beside(torch.ones(1).expand(4))


def float8():
    return beside(torch.ones(4).to(torch.float8_e4m3fn))


def scales():
    return beside(torch.ones(4, dtype=torch.uint8).view(torch.float8_e8m0fnu))


def packed():
    return beside(torch.ones(4, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))


def data():
    x = torch.rand(120, 6, generator=torch.Generator().manual_seed(0))
    return x.numpy(), (x.sum(1).argsort().argsort() % 3).numpy()
"""
TRAIN = ("--epochs", "1", "--lr", "0.01", "--threads", "1")


class Bench:
    """A folder with the code above; commands on a checkpoint of one of its networks."""

    def __init__(self, folder: Path, name: str) -> None:
        (folder / "nets.py").write_text(CODE)
        self.folder, self.model = folder, ("--model", f"{folder}/nets.py:{name}")
        self.data = ("--data", f"{folder}/nets.py:data")
        self.checkpoint, self.scores, self.submodel = folder / "g.safetensors", folder / "s", folder / "sub"

    def train(self, *source: object, output: Path | None = None, model: tuple[str, ...] = ()) -> Done:
        where = self.checkpoint if output is None else output
        return run_here("train", *source, *(model or self.model), *self.data, *TRAIN, "--no-onnx", "-o", where)

    def evaluate(self, *options: object) -> Done:
        return run_here("evaluate", self.checkpoint, *self.model, *options, *self.data, "--no-latency", "--json")

    def prune(self, keep: str = "0.5") -> None:
        done = [
            run_here("score", self.checkpoint, *self.model, *self.data, "-o", self.scores),
            run_here(
                *("prune", self.checkpoint, *self.model, "--scores", self.scores, "--keep", keep, "--no-onnx"),
                *("--selection", "independent", "-o", self.submodel),
            ),
        ]
        assert [one.code for one in done] == [0, 0], done[-1].error

    def tensors(self, path: Path) -> dict[str, np.ndarray]:
        with open_safetensors(path) as file:
            return {name: file.read(name) for name in file.tensors}


@pytest.mark.parametrize(
    ("name", "says"),
    [("Double", "'wide' cannot be saved: it is of type complex128"), ("Named", r"'line\nbreak' cannot be saved")],
)
def test_what_cannot_be_saved_is_refused_before_the_first_epoch(name: str, says: str, tmp_path: Path) -> None:
    done = Bench(tmp_path, name).train()
    assert done.code == 3 and says in done.error and "epoch" not in done.stderr


def test_an_infinite_constant_goes_through_every_command_and_comes_back_as_it_was(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "Masked")
    assert bench.train().code == 0 and bench.evaluate().code == 0
    bench.prune()
    clients = [tmp_path / "a", tmp_path / "b"]
    curvature = ("--curvature", "20")
    assert [bench.train(bench.submodel, *curvature, output=client).code for client in clients] == [0, 0]
    before = bench.tensors(bench.checkpoint)
    for rule in ("fill", "covered", "median", "curvature"):
        more = () if rule == "median" else ("--clip", "median", "--server-lr", "0.5")
        merged, report = tmp_path / f"{rule}.safetensors", tmp_path / f"{rule}.json"
        done = run_here(
            "reconstruct", bench.checkpoint, *clients, "--rule", rule, *more, "-o", merged, "--report", report
        )
        assert done.code == 0, done.error
        after = bench.tensors(merged)
        assert after["mask"].tobytes() == before["mask"].tobytes()
        assert np.isfinite(after["first.weight"]).all() and not np.array_equal(
            after["first.weight"], before["first.weight"]
        )
    partial = tmp_path / "p.partial.safetensors"
    assert run_here("reconstruct", bench.checkpoint, *clients, "--partial", "-o", partial).code == 0
    assert run_here("reconstruct", bench.checkpoint, partial, "-o", tmp_path / "again.safetensors").code == 0
    assert bench.tensors(tmp_path / "again.safetensors")["mask"].tobytes() == before["mask"].tobytes()


def test_an_infinity_that_the_factory_does_not_make_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    bench = Bench(tmp_path, "Masked")
    assert bench.train().code == 0
    sound = bench.tensors(bench.checkpoint)
    foreign = ("--input-shape", "6", "--classes", "3")
    for name, value in (("mask", np.inf), ("mask", np.nan), ("first.bias", -np.inf)):
        changed = {**sound, name: np.where(np.arange(8) == 3, value, sound[name]).astype(np.float32)}
        save_file(changed, bench.checkpoint)
        done = bench.evaluate(*foreign)
        assert done.code == 3 and f"tensor '{name}' holds NaN or Inf" in done.error
    save_file(sound, bench.checkpoint)
    assert bench.evaluate(*foreign).code == 0


def test_a_client_that_changed_an_infinite_constant_or_made_another_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    bench = Bench(tmp_path, "Masked")
    assert bench.train().code == 0
    bench.prune(keep="1.0")
    path = bench.submodel / "submodel.safetensors"
    with open_safetensors(path) as file:
        metadata, sound = dict(file.metadata), {name: file.read(name) for name in file.tensors}
    for name, old, new in (("mask", 0.0, -np.inf), ("mask", -np.inf, np.inf), ("head.bias", None, np.inf)):
        changed = {key: array.copy() for key, array in sound.items()}
        places = changed[name] == old if old is not None else np.arange(3) == 0
        changed[name][places] = new
        save_file(changed, path, metadata)
        done = run_here("reconstruct", bench.checkpoint, bench.submodel, "-o", tmp_path / "r.safetensors")
        assert done.code == 3 and f"'{name}' holds NaN or infinite" in done.error


def test_training_that_makes_a_buffer_infinite_is_still_a_fault(tmp_path: Path) -> None:
    done = Bench(tmp_path, "Overflowing").train()
    assert done.code == 3 and "training left NaN or Inf in 'seen'" in done.error


def test_complex_weights_are_trained_scored_cut_and_read_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "Complex")
    assert bench.train().code == 0
    trained = bench.tensors(bench.checkpoint)["filter"]
    assert trained.dtype == np.complex64 and not np.array_equal(trained, np.ones(4))
    bench.prune()
    assert bench.tensors(bench.submodel / "submodel.safetensors")["filter"].tobytes() == trained.tobytes()
    done = run_here("evaluate", bench.submodel, *bench.model, *bench.data, "--no-latency")
    assert done.code == 0, done.error


@pytest.mark.parametrize("name", ["Extra", "ExtraTensor"])
def test_extra_state_goes_through_every_command_or_is_left_out_with_a_word(name: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, name)
    done = bench.train()
    assert done.code == 0 and ("not saved, being no tensor: _extra_state" in done.stderr) == (name == "Extra")
    assert ("_extra_state" in bench.tensors(bench.checkpoint)) == (name == "ExtraTensor")
    bench.prune()
    assert bench.train(bench.submodel, output=tmp_path / "client").code == 0
    done = run_here("reconstruct", bench.checkpoint, tmp_path / "client", "-o", tmp_path / "r.safetensors")
    assert done.code == 0, done.error


@pytest.mark.parametrize("name", ["empty", "expanded", "float8", "scales"])
def test_buffers_of_odd_shapes_and_types_go_through_every_command(name: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, name)
    assert bench.train().code == 0 and bench.evaluate().code == 0
    bench.prune()
    done = bench.train(bench.submodel, "--curvature", "10", output=tmp_path / "client")
    assert done.code == 0, done.error
    done = run_here("reconstruct", bench.checkpoint, tmp_path / "client", "-o", tmp_path / "r.safetensors")
    assert done.code == 0, done.error
    before, after = (bench.tensors(path)["odd"] for path in (bench.checkpoint, tmp_path / "r.safetensors"))
    assert before.dtype == after.dtype and before.tobytes() == after.tobytes()


def test_packed_buffers_are_kept_and_are_refused_by_name_where_they_would_be_cut(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "packed")
    assert bench.train().code == 0 and bench.evaluate().code == 0
    with open_safetensors(bench.checkpoint) as file:
        assert (file.tensors["odd"].dtype, file.tensors["odd"].shape) == ("F4", (4, 4))
    with pytest.raises(AssertionError, match="'odd' has several numbers in a byte"):
        bench.prune()


def test_recorded_arguments_hold_where_the_model_is_named_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "Net")
    assert bench.train(model=(*bench.model, "--model-arg", "act=tanh")).code == 0
    recorded, same = bench.evaluate(), bench.evaluate("--model-arg", "act=tanh")
    other = bench.evaluate("--model-arg", "act=relu")
    assert recorded.json["loss"] == same.json["loss"] != other.json["loss"]
    state = {name: torch.from_numpy(array) for name, array in bench.tensors(bench.checkpoint).items()}
    assert state.keys() == {"first.weight", "first.bias", "head.weight", "head.bias"}
