"""`cahfp train --curvature`: the measurement against a computation of its own, the file, and what merges by it."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from typer.testing import CliRunner

from cahfp_cli.app import app
from cahfp_cli.checkpoint.metadata import CurvatureMetadata, read_metadata
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.data.dataset import Dataset, make_dataset
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.formats.files import CURVATURE
from cahfp_cli.training import curvature as module
from cahfp_cli.training.curvature import EXACT_CLASSES, measure_curvature
from cahfp_cli.training.sgd import TrainOptions, epoch_batches

CPU = torch.device("cpu")
ALL = 1 << 20
SKIPPED = ("running_mean", "running_var", "num_batches_tracked")

NETWORK = """
from torch import nn


def make(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, classes),
    )
"""


class Tiny(nn.Module):
    """Batch norm, dropout, a frozen parameter, a tied one, a float buffer, and a parameter that nothing reads."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.mix = nn.Linear(12, 12)
        self.again = nn.Linear(12, 12)
        self.again.weight = self.mix.weight
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(12, classes)
        self.head.bias.requires_grad_(False)
        self.unread = nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.norm(self.conv(x))).flatten(1) * self.scale
        return self.head(self.dropout(torch.tanh(self.again(torch.tanh(self.mix(hidden))))))


def tiny(classes: int) -> Tiny:
    torch.manual_seed(classes)
    model = Tiny(classes)
    with torch.no_grad():
        model(torch.randn(32, 1, 4, 4) * 2 + 1)  # running statistics that are not those of one sample
        model.head.weight.mul_(3)
    return model.train()


def names(model: nn.Module) -> list[str]:
    return [name for name in model.state_dict() if name.rpartition(".")[2] not in SKIPPED]


def data(samples: int, classes: int) -> Dataset:
    random = np.random.default_rng(samples)
    x = random.standard_normal((samples, 1, 4, 4)).astype(np.float32)
    return make_dataset(x, np.sort(random.integers(0, classes, samples)), "share", classes)


def brute_force(model: nn.Module, x: np.ndarray) -> dict[str, np.ndarray]:
    """E sum_c p_c (d log p_c / d w)^2 in float64, class by class from the log-likelihood itself."""
    model = copy.deepcopy(model).double().eval()
    state = model.state_dict(keep_vars=True)
    wanted = {name: state[name].requires_grad_(True) for name in names(model)}
    sums = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    for sample in torch.from_numpy(x).double():
        for label in range(model(sample[None]).shape[1]):
            for tensor in wanted.values():
                tensor.grad = None
            log_p = model(sample[None]).log_softmax(1)[0, label]
            log_p.backward()
            for name, tensor in wanted.items():
                if tensor.grad is not None:
                    sums[name] += log_p.detach().exp() * tensor.grad**2
    return {name: (total / len(x)).detach().numpy() for name, total in sums.items()}


@pytest.mark.parametrize("classes", [1, 2, 5, EXACT_CLASSES])
def test_it_is_the_expectation_over_classes_of_squared_gradients_of_the_log_likelihood(classes: int) -> None:
    model, share = tiny(classes), data(7, classes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls: list[tuple[int, int]] = []
    found = measure_curvature(model, names(model), share, ALL, CPU, on_progress=lambda *call: calls.append(call))
    expected = brute_force(model, share.x)
    assert (found.samples, found.draws) == (7, None) and calls == [(i, 7) for i in range(1, 8)]
    assert found.arrays.keys() == expected.keys() == set(names(model))
    for name, array in found.arrays.items():
        assert array.dtype == np.float32 and array.shape == expected[name].shape
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-6 * expected[name].max(), err_msg=name)
        assert (array >= 0).all() and (array.any() or name == "unread" or classes == 1)
    assert np.array_equal(found.arrays["mix.weight"], found.arrays["again.weight"])
    assert model.training and not model.scale.requires_grad and not model.head.bias.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_it_is_the_gauss_newton_diagonal_and_does_not_look_at_labels() -> None:
    model, share = tiny(4).eval(), data(6, 4)
    found = measure_curvature(model, names(model), share, ALL, CPU)
    other = Dataset(share.x, 3 - share.y, 4, "other labels")
    assert same(found.arrays, measure_curvature(model, names(model), other, ALL, CPU).arrays)
    head = model.head.weight
    diagonal = np.zeros(head.shape)
    for sample in torch.from_numpy(share.x):
        fixed = {}
        handle = model.head.register_forward_pre_hook(lambda _, args, fixed=fixed: fixed.update(x=args[0].detach()))
        p = model(sample[None]).softmax(1)[0].detach().numpy()
        handle.remove()
        diagonal += np.outer(p * (1 - p), fixed["x"][0].numpy() ** 2) / len(share)
    np.testing.assert_allclose(found.arrays["head.weight"], diagonal, rtol=1e-4)


def test_beyond_sixteen_classes_drawn_labels_estimate_it_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    model, share = tiny(EXACT_CLASSES + 1), data(3, EXACT_CLASSES + 1)
    expected = brute_force(model, share.x)
    runs = [measure_curvature(model, ["head.weight"], share, ALL, CPU, seed=seed) for seed in range(60)]
    assert {run.draws for run in runs} == {module.DRAWS}
    estimates = np.stack([run.arrays["head.weight"] for run in runs])
    error = estimates.std(0, ddof=1) / len(runs) ** 0.5
    wrong = (estimates.mean(0) - expected["head.weight"]) / error
    assert 0.7 < np.sqrt((wrong**2).mean()) < 1.3  # as far off as chance has it
    monkeypatch.setattr(module, "DRAWS", 200_000)
    many = measure_curvature(model, names(model), share, ALL, CPU).arrays
    for name, array in many.items():
        np.testing.assert_allclose(array, expected[name], rtol=0.1, atol=0.01 * expected[name].max(), err_msg=name)


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    assert one.keys() == other.keys()
    return all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_the_seed_chooses_the_samples_that_training_sees_first() -> None:
    model, share = tiny(3), data(50, 3)
    first, _ = next(epoch_batches(share, TrainOptions(batch_size=8, seed=5), 0))
    found = measure_curvature(model, names(model), share, 8, CPU, seed=5)
    expected = brute_force(model, first)
    for name, array in found.arrays.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-6 * expected[name].max())
    state = torch.get_rng_state()
    assert same(found.arrays, measure_curvature(model, names(model), share, 8, CPU, seed=5).arrays)
    assert not same(found.arrays, measure_curvature(model, names(model), share, 8, CPU, seed=6).arrays)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("weight", "size"), [(float("nan"), 1.0), (0.0, 1e25)])
def test_a_curvature_that_is_not_finite_is_refused(weight: float, size: float) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    nn.init.constant_(model[1].weight, weight)
    share = data(4, 3)
    with pytest.raises(InputError, match=r"curvature in '1\..*' is not finite on share"):
        measure_curvature(model, names(model), Dataset(share.x * np.float32(size), share.y, 3, "share"), ALL, CPU)


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if code:
        assert isinstance(result.exception, SystemExit | UsageError), result.exception
        assert (result.exit_code if isinstance(result.exception, SystemExit) else result.exception.exit_code) == code
        return str(result.exception) if isinstance(result.exception, UsageError) else result.stderr
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, two submodels of it, each trained with its curvature."""
    torch.set_num_threads(1)
    here = tmp_path_factory.mktemp("curvature")
    (here / "net.py").write_text(NETWORK)
    model = ("--model", f"{here / 'net.py'}:make")
    start = ("--data", "digits@train[:300]", "--epochs", 2, "--lr", 0.1)
    call("train", *model, *start, "-o", here / "global.safetensors")
    whole, scores = here / "global.safetensors", here / "scores.safetensors"
    call("score", whole, *model, "--data", "digits@train[:64]", "--samples", 32, "--held-out", 0, "-o", scores)
    for name, share, data in (("big", 0.8, "digits@train[300:700]"), ("small", 0.5, "digits@train[700:1000]")):
        call("prune", whole, *model, "--scores", scores, "--keep", share, "--no-onnx", "-o", here / name)
        how = (*model, "--data", data, *LOCAL, "-o", here / f"{name}-trained")
        call("train", here / name, *how)
    return here


LOCAL = ("--steps", 8, "--no-onnx", "--curvature", 10, "--seed", 3)


def test_train_writes_what_reconstruct_reads(folder: Path) -> None:
    trained = [folder / "big-trained", folder / "small-trained"]
    for one in trained:
        weights, own = load_file(one / "submodel.safetensors"), load_file(one / CURVATURE)
        assert {name: array.shape for name, array in own.items()} == {
            name: array.shape for name, array in weights.items() if name.rpartition(".")[2] not in SKIPPED
        }
        assert all(array.dtype == np.float32 and (array >= 0).all() for array in own.values())
        with open_safetensors(one / CURVATURE) as file:
            about = read_metadata(file, CurvatureMetadata)
        assert (about.samples, about.draws) == (10, None)
        assert about.provenance.command == "train" and about.provenance.options["curvature"] == 10
        training = json.loads((one / "report.json").read_text())["training"]
        assert training["curvature"] == {"samples": 10, "draws": None}
    merged = {}
    for rule in ("curvature", "covered"):
        output = folder / f"{rule}.safetensors"
        call("reconstruct", folder / "global.safetensors", *trained, "--rule", rule, "-o", output)
        merged[rule] = load_file(output)
    assert not np.array_equal(merged["curvature"]["3.weight"], merged["covered"]["3.weight"])
    assert same(*({"mean": merged[rule]["1.running_mean"]} for rule in merged))


def test_inspect_tells_of_the_file_alone_and_in_its_folder(folder: Path) -> None:
    alone = json.loads(call("inspect", folder / "big-trained" / CURVATURE, "--json"))
    assert alone["kind"] == "curvature" and alone["samples"] == 10
    whole = json.loads(call("inspect", folder / "big-trained", "--json"))
    assert whole["files"][CURVATURE] == alone
    assert whole["files"]["submodel.safetensors"]["checkpoint"] == alone["checkpoint"]


def again(folder: Path, source: str, output: str, *more: object) -> Path:
    model = ("--model", f"{folder / 'net.py'}:make")
    call("train", folder / source, *model, "--data", "digits@train[300:700]", *more, "-o", folder / output)
    return folder / output


def test_equal_seeds_give_equal_bytes_and_measuring_does_not_change_the_training(folder: Path) -> None:
    first = folder / "big-trained"
    for output in ("equal", "without"):
        options = LOCAL if output == "equal" else ("--steps", 8, "--no-onnx", "--seed", 3)
        made = again(folder, "big", output, *options)
        files = {path.name for path in made.iterdir()}
        assert files == {path.name for path in first.iterdir()} - ({CURVATURE} if output == "without" else set())
        if output == "equal":
            assert all((made / name).read_bytes() == (first / name).read_bytes() for name in files)
        assert same(load_file(made / "submodel.safetensors"), load_file(first / "submodel.safetensors"))
    other = again(folder, "big", "other", *LOCAL[:-1], 4)
    assert (other / CURVATURE).read_bytes() != (first / CURVATURE).read_bytes()


def test_a_curvature_of_the_weights_before_is_not_carried_over(folder: Path) -> None:
    more = ("--steps", 1, "--no-onnx")
    trained = again(folder, "big-trained", "trained-on", *more)
    assert not (trained / CURVATURE).exists()
    assert "curvature" not in json.loads((trained / "report.json").read_text())["training"]
    again(folder, "big", "in-place", *LOCAL)
    assert (folder / "in-place" / CURVATURE).exists()
    assert not (again(folder, "in-place", "in-place", *more, "--force") / CURVATURE).exists()
    result = CliRunner().invoke(
        app,
        [*map(str, ("reconstruct", folder / "global.safetensors", trained, "--rule", "curvature")), "-o", "out"],
    )
    assert isinstance(result.exception, InputError) and "cahfp train --curvature" in str(result.exception)


def test_more_than_there_is_is_all_there_is_with_a_warning(folder: Path) -> None:
    model = ("--model", f"{folder / 'net.py'}:make")
    how = ("--data", "digits@train[:12]", "--steps", 1, "--no-onnx", "--curvature", 99, "--json")
    result = CliRunner().invoke(app, [*map(str, ("train", folder / "small", *model, *how, "-o", folder / "few"))])
    assert result.exit_code == 0 and "has only 12 samples, fewer than --curvature 99" in result.stderr
    assert json.loads(result.stdout)["training"]["curvature"] == {"samples": 12, "draws": None}


def test_bad_options_are_usage_errors_and_write_nothing(folder: Path) -> None:
    output = folder / "nothing"
    model = ("--model", f"{folder / 'net.py'}:make")
    for source in ((), (folder / "global.safetensors",)):
        said = call("train", *source, *model, "--steps", 1, "--curvature", 4, "-o", output, code=2)
        assert "--curvature goes with a SUBMODEL_DIR" in said
    for number in ("0", "-1", "many"):
        said = call("train", folder / "big", *model, "--curvature", number, "-o", output, code=2)
        assert "--curvature" in said
    assert not output.exists()
