"""Checkpoints as people have them: wrappers' names, training states, old and odd files; judged by what is in them."""

import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cahfp_cli.checkpoint.digest import content_digest
from cahfp_cli.checkpoint.fitting import fit
from cahfp_cli.checkpoint.sharded import open_checkpoint
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.models.checkpoint_io import LoadedCheckpoint, load_checkpoint, open_weights
from cahfp_cli.models.tensors import state_arrays

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(144, 3)

    def forward(self, x):
        return self.head(self.body(x))


class Versioned(Net):
    def get_extra_state(self):
        return {"version": 2}

    def set_extra_state(self, state):
        raise RuntimeError("no version was saved")


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()
        self.register_buffer("mean", torch.tensor(0.5), persistent=False)

    def forward(self, x):
        return self.net(x - self.mean)
"""
State = dict[str, torch.Tensor]


class Net(nn.Module):
    """As in NET."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(144, 3)


@pytest.fixture
def network() -> Net:
    torch.manual_seed(1)
    net = Net()
    net.body[1].running_mean.normal_()
    return net


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., LoadedCheckpoint]:
    (tmp_path / "net.py").write_text(NET)

    def run(path: Path, factory: str = "Net", key: str | None = None) -> LoadedCheckpoint:
        return load_checkpoint(path, model=f"{tmp_path}/net.py:{factory}", input_shape=(1, 8, 8), key=key)

    return run


def prefixed(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def without_counters(state: Mapping[str, torch.Tensor]) -> State:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def check(loaded: LoadedCheckpoint, state: Mapping[str, torch.Tensor]) -> None:
    found = loaded.model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


FLAT: dict[str, Callable[[State], State]] = {
    "DataParallel": lambda state: prefixed(state, "module."),
    "compile": lambda state: prefixed(state, "_orig_mod."),
    "both": lambda state: prefixed(state, "module._orig_mod."),
    "Lightning": lambda state: {**prefixed(state, "model."), "loss.weight": torch.ones(3)},
    "compiled in part": lambda state: {name.replace("body.", "body._orig_mod."): t for name, t in state.items()},
    "averaged": lambda state: {"n_averaged": torch.tensor(7), **prefixed(state, "module.")},
    "no counters": without_counters,
    "no counters under a prefix": lambda state: prefixed(without_counters(state), "net.backbone."),
    "part of a larger network": lambda state: {**prefixed(state, "a.b."), "a.c.weight": torch.ones(2)},
}


@pytest.mark.parametrize("form", FLAT)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_names_of_wrappers_are_read_as_the_networks_own_and_give_its_digest(
    form: str, suffix: str, network: Net, load: Callable[..., LoadedCheckpoint], tmp_path: Path
) -> None:
    state = dict(network.state_dict())
    path = tmp_path / f"m.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(FLAT[form](state), path)
    loaded = load(path)
    check(loaded, state)
    save_arrays(tmp_path / "plain", state_arrays(network), {})
    assert loaded.digest == content_digest(tmp_path / "plain")
    left_out = [name for name in FLAT[form](state) if name in ("n_averaged", "loss.weight", "a.c.weight")]
    assert [f"{path}: left out, being no part of the network: {name}" for name in left_out] == list(loaded.remarks)
    with open_weights(path) as weights:  # as reconstruction reads it, which has no model but knows the names
        assert content_digest(fit(weights.file, set(state))) == loaded.digest


def test_a_network_inside_a_wrapper_of_the_factory_takes_the_names_without_it(
    network: Net, load: Callable[..., LoadedCheckpoint], tmp_path: Path
) -> None:
    save_file(dict(network.state_dict()), tmp_path / "m.safetensors")
    check(load(tmp_path / "m.safetensors", "Normalised"), prefixed(network.state_dict(), "net."))


NESTED: dict[str, Callable[[State], Any]] = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "rng": torch.get_rng_state()},
    "net": lambda state: {"net": state, "acc": np.float64(91.5), "args": Namespace(lr=0.1, out=Path("x"))},
    "model": lambda state: {"model": state, "model_ema": {name: t + 1 for name, t in state.items()}},
    "odd": lambda state: {"whatever": state, "history": np.ones(3)},
    "deep": lambda state: {"module": {"state_dict": prefixed(state, "module.")}, "lr": 0.1},
    "list": lambda state: [state, {"epoch": 2}],
    "optimizer": lambda state: {"model": state, "optimizer": {"state": {0: {"momentum": torch.ones(2)}}}},
}


@pytest.mark.parametrize("form", NESTED)
@pytest.mark.parametrize("name", ["m.th", "m.ckpt", "m.bin", "m.pth.tar", "m", "m.safetensors"])
def test_training_states_are_read_whatever_the_file_is_called(
    form: str, name: str, network: Net, load: Callable[..., LoadedCheckpoint], tmp_path: Path
) -> None:
    state = dict(network.state_dict())
    torch.save(NESTED[form](state), tmp_path / name, _use_new_zipfile_serialization=name != "m.th")
    loaded = load(tmp_path / name)
    check(loaded, state)
    others = [f"{tmp_path / name}: it also holds model_ema, which --key would take"] if form == "model" else []
    assert list(loaded.remarks) == others


def test_a_safetensors_file_is_one_whatever_it_is_called(
    network: Net, load: Callable[..., LoadedCheckpoint], tmp_path: Path
) -> None:
    save_file(dict(network.state_dict()), tmp_path / "m.pt")
    check(load(tmp_path / "m.pt"), network.state_dict())


def test_key_chooses_among_several_networks_and_what_is_there_is_listed(
    network: Net, load: Callable[..., LoadedCheckpoint], tmp_path: Path
) -> None:
    state, other = dict(network.state_dict()), {name: tensor + 1 for name, tensor in network.state_dict().items()}
    nested, flat = tmp_path / "nested.pt", tmp_path / "flat.safetensors"
    torch.save({"student": state, "nets": {"teacher": other}}, nested)
    save_file({**prefixed(state, "student."), **prefixed(other, "nets.teacher.")}, flat)
    for path in (nested, flat):
        check(load(path, key="student"), state)
        check(load(path, key="nets.teacher"), other)
    with pytest.raises(UsageError, match=r"several state dicts: choose one by --key. There are: student, nets.teacher"):
        load(nested)
    with pytest.raises(InputError, match=r"under several names, 'nets.teacher' and 'student': choose one by --key"):
        load(flat)
    with pytest.raises(UsageError, match=r"no state dict 'tutor'. There are: student, nets.teacher"):
        load(nested, key="tutor")
    with pytest.raises(UsageError, match=r"no tensor's name starts so. They start with nets, student"):
        load(flat, key="tutor")


def test_state_that_is_no_tensor_is_left_out_and_said(
    network: Net, load: Callable[..., LoadedCheckpoint], tmp_path: Path
) -> None:
    path = tmp_path / "m.pt"
    torch.save({**network.state_dict(), "_extra_state": {"version": 1}}, path)
    loaded = load(path, "Versioned")
    assert torch.equal(loaded.model.get_parameter("head.bias"), network.head.bias)
    assert list(loaded.remarks) == [
        f"{path}: left out, being no tensor: _extra_state",
        "not saved, being no tensor: _extra_state of the model's state",
    ]


@pytest.mark.filterwarnings("ignore")  # of torch, on the tensors that the test makes
@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (lambda: torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8), "a quantised tensor (qint8)"),
        (lambda: torch.rand(3).to_sparse(), "a sparse_coo tensor"),
        (lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)]), "a nested tensor"),
        (lambda: torch.empty(3, device="meta"), "a tensor without data"),
        (lambda: torch.rand(3, dtype=torch.complex128), "of type complex128"),
    ],
)
def test_tensors_that_no_file_of_ours_holds_are_refused_by_name(
    odd: Callable[[], torch.Tensor], says: str, load: Callable[..., LoadedCheckpoint], tmp_path: Path
) -> None:
    torch.save({"head.weight": odd()}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"m\.pt: 'head.weight' is") as error:
        load(tmp_path / "m.pt")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(0, 3), "0x3"),
        (torch.zeros(1).expand(10**13), "10000000000000"),  # claims more than any memory, and holds four bytes
        (torch.rand(3, dtype=torch.complex64).conj(), "3 complex64"),
        (torch.rand(4, 3).T, "3x4"),
        (torch.zeros(3, dtype=torch.uint16), "3 uint16"),
    ],
)
def test_exotic_tensors_are_compared_before_they_cost_memory(
    tensor: torch.Tensor, expected: str, network: Net, load: Callable[..., LoadedCheckpoint], tmp_path: Path
) -> None:
    torch.save({**network.state_dict(), "head.bias": tensor}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=f"'head.bias' is {expected}, expected 3"):
        load(tmp_path / "m.pt")


def test_archives_that_hold_code_or_are_larger_inside_are_refused(
    network: Net, load: Callable[..., LoadedCheckpoint], tmp_path: Path
) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "script.pt"))
    torch.save(network.state_dict(), tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as source, zipfile.ZipFile(tmp_path / "z.pt", "w", 8) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
        target.writestr("m/data/bomb", bytes(10**7))
    torch.save(network, tmp_path / "whole.pt")
    with pytest.raises(InputError, match="TorchScript"):
        load(tmp_path / "script.pt")
    with pytest.raises(InputError, match="a damaged one"):
        load(tmp_path / "z.pt")
    with pytest.raises(InputError, match=r"holds code, not only tensors \(.*Net\)"):
        load(tmp_path / "whole.pt")


def test_a_checkpoint_with_its_own_names_is_read_as_it_is(network: Net, tmp_path: Path) -> None:
    save_file(dict(network.state_dict()), tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as file:
        assert fit(file, set(network.state_dict())) is file
        assert fit(file, {"nothing.of", "it"}) is file
