"""Checkpoints to networks and back, and every way in which they may not fit."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from cahfp_cli.checkpoint.digest import content_digest
from cahfp_cli.checkpoint.metadata import CheckpointMetadata, ModelSpec, Provenance
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.models.checkpoint_io import load_checkpoint, save_checkpoint
from cahfp_cli.models.spec import build
from cahfp_cli.models.tensors import check_can_be_saved, state_arrays, to_tensor

SHAPE = (1, 8, 8)
OURS = ModelSpec(spec="resnet20", args={"width": 0.25})
GIVEN: dict[str, Any] = {"model": "resnet20", "model_args": {"width": 0.25}, "input_shape": SHAPE, "classes": 10}


def metadata(spec: ModelSpec | None = OURS, **fields: Any) -> CheckpointMetadata:
    known = {"model": spec, "input_shape": SHAPE, "classes": 10, **fields}
    return CheckpointMetadata(provenance=Provenance(tool="test", command="train"), **known)


@pytest.fixture
def network() -> nn.Module:
    return build(OURS, SHAPE, 10, seed=3)


def test_a_saved_checkpoint_loads_with_nothing_but_its_path(network: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, network, metadata(), force=False)
    loaded = load_checkpoint(path)
    assert (loaded.spec, loaded.input_shape, loaded.classes, loaded.files) == (OURS, SHAPE, 10, (path,))
    assert loaded.digest == content_digest(path) and not loaded.model.training
    before, after = state_arrays(network), state_arrays(loaded.model)
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and np.array_equal(before[k], after[k]) for k in before)


def test_saving_twice_gives_the_same_bytes_and_overwrites_only_by_force(network: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, network, metadata(), force=False)
    first = path.read_bytes()
    with pytest.raises(InputError, match="--force"):
        save_checkpoint(path, network, metadata(), force=False)
    save_checkpoint(path, network, metadata(), force=True)
    assert path.read_bytes() == first


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_state_dicts_of_pytorch_load_and_have_the_digest_of_the_same_safetensors(
    wrapper: str | None, suffix: str, network: nn.Module, tmp_path: Path
) -> None:
    path, same = tmp_path / f"m.{suffix}", tmp_path / "m.safetensors"
    state = network.state_dict()
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, path)
    save_arrays(same, state_arrays(network), {})
    loaded = load_checkpoint(path, **GIVEN)
    assert torch.equal(loaded.model.get_parameter("fc.weight"), state["fc.weight"])
    assert loaded.digest == load_checkpoint(same, **GIVEN).digest


def test_bfloat16_weights_are_read_exactly_and_written_with_the_same_bits(network: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    arrays = state_arrays(network.to(torch.bfloat16))
    assert arrays["conv1.weight"].dtype == ml_dtypes.bfloat16
    save_arrays(path, arrays, {})
    loaded = load_checkpoint(path, **GIVEN)
    weight = loaded.model.get_parameter("conv1.weight")
    assert weight.dtype == torch.float32
    assert np.array_equal(weight.detach().numpy(), arrays["conv1.weight"].astype(np.float32))
    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        values = np.array([[1.5, -2.0], [0.25, 3.0]]).astype(dtype)
        assert np.array_equal(to_tensor(values).float().numpy(), values.astype(np.float32))


@pytest.mark.parametrize("missing", ["model", "input_shape", "classes"])
def test_a_checkpoint_of_someone_else_asks_for_what_it_does_not_record(
    missing: str, network: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    save_arrays(path, state_arrays(network), {})
    given = {key: value for key, value in GIVEN.items() if key != missing}
    if missing == "model":
        del given["model_args"]
    with pytest.raises(UsageError, match=f"--{missing.replace('_', '-')}"):
        load_checkpoint(path, **given)


def test_a_factory_without_classes_is_asked_for_them_by_running_it(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))\n"
    )
    path = tmp_path / "m.pt"
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).state_dict(), path)
    factory = f"{tmp_path / 'net.py'}:make"
    assert load_checkpoint(path, model=factory, input_shape=(1, 2, 2)).classes == 3
    with pytest.raises(InputError, match="does not run on a sample of 1x9x9"):
        load_checkpoint(path, model=factory, input_shape=(1, 9, 9))


def test_a_checkpoint_never_makes_us_run_code_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    path = tmp_path / "m.safetensors"
    record = metadata(ModelSpec(spec=f"{tmp_path / 'evil.py'}:make"))
    save_checkpoint(path, nn.Linear(2, 2), record, force=False)
    with pytest.raises(UsageError, match="a file may not decide"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def changed(network: nn.Module, change: str) -> dict[str, np.ndarray[Any, Any]]:
    arrays = dict(state_arrays(network))
    match change:
        case "missing":
            del arrays["fc.bias"]
        case "unexpected":
            arrays["extra"] = np.zeros(3, np.float32)
        case "shape":
            arrays["fc.weight"] = arrays["fc.weight"][:-1]
        case "type":
            arrays["fc.bias"] = np.zeros(10, np.int64)
        case "nan":
            arrays["fc.bias"] = np.full(10, np.nan, np.float32)
        case "inf":
            arrays["bn1.running_var"] = np.full_like(arrays["bn1.running_var"], np.inf)
        case "many":
            arrays = {f"module.{name}": array[..., None] for name, array in arrays.items()}
    return arrays


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("missing", "misses 'fc.bias' 10"),
        ("unexpected", "has unexpected 'extra' 3"),
        ("shape", "'fc.weight' is 9x16, expected 10x16"),
        ("type", "'fc.bias' is 10 int64, expected 10"),
        ("nan", "tensor 'fc.bias' holds NaN or Inf"),
        ("inf", "tensor 'bn1.running_var' holds NaN or Inf"),
        ("many", "'conv1.weight' is 4x1x3x3x1, expected 4x1x3x3, "),
    ],
)
def test_tensors_that_are_not_the_models_are_named(
    change: str, says: str, suffix: str, network: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / f"m.{suffix}"
    arrays = changed(network, change)
    if suffix == "pt":
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    else:
        save_arrays(path, arrays, {})
    with pytest.raises(InputError) as caught:
        load_checkpoint(path, **GIVEN)
    assert says in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 700 and len(str(caught.value).splitlines()) <= 2


def test_a_record_that_asks_for_a_huge_network_is_refused_before_memory_is_spent(
    network: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    for record in (metadata(ModelSpec(spec="vgg16", args={"width": 1000.0})), metadata(classes=10**9)):
        save_checkpoint(path, network, record, force=True)
        with pytest.raises(InputError, match="does not fit the model"):
            load_checkpoint(path)


class Pickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


def test_a_pickle_that_holds_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.pt"
    for content in (Pickled(), build(OURS, SHAPE, 10), {"state_dict": Pickled()}):
        torch.save(content, path)
        with pytest.raises(InputError, match="holds code, not only tensors"):
            load_checkpoint(path, **GIVEN)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut short", b"\x80\x02."])
def test_a_damaged_pytorch_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"m\.pth"):
        load_checkpoint(path, **GIVEN)
    with pytest.raises(InputError, match="no such file"):
        load_checkpoint(tmp_path / "none.pt", **GIVEN)


@pytest.mark.parametrize("content", [3, {}, [torch.zeros(2)], {"epoch": 3}, {1: torch.zeros(1)}])
def test_a_pytorch_file_of_other_things_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(InputError, match="state dict"):
        load_checkpoint(tmp_path / "m.pt", **GIVEN)


def test_tied_weights_may_be_stored_under_one_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "tied.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))\n"
        "    net[1].weight = net[0].weight\n"
        "    return net\n"
    )
    arrays = {
        "0.weight": np.eye(4, dtype=np.float32),
        "0.bias": np.zeros(4, np.float32),
        "1.bias": np.ones(4, np.float32),
    }
    save_arrays(tmp_path / "m.safetensors", arrays, {})
    loaded = load_checkpoint(tmp_path / "m.safetensors", model=f"{tmp_path / 'tied.py'}:make", input_shape=(4,))
    assert torch.equal(loaded.model.get_parameter("1.weight"), torch.eye(4))


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (torch.zeros(2, dtype=torch.complex128), "of type complex128"),
        (torch.zeros(2).to_sparse(), "a sparse_coo tensor"),
        (torch.empty(2, device="meta"), "a tensor without data"),
    ],
)
def test_a_state_that_safetensors_cannot_hold_is_named(odd: torch.Tensor, says: str) -> None:
    net = nn.Linear(2, 2)
    net.register_buffer("odd", odd)
    with pytest.raises(InputError, match=f"'odd' is {says}"):
        state_arrays(net)
    with pytest.raises(InputError, match=f"'odd' cannot be saved: it is {says}"):
        check_can_be_saved(net)
