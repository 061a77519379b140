"""Training, evaluation and latency, on real digits."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from cahfp_cli.checkpoint.metadata import ModelSpec
from cahfp_cli.data.dataset import Dataset, make_dataset
from cahfp_cli.data.spec import load_data
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.models.spec import build
from cahfp_cli.models.tensors import state_arrays
from cahfp_cli.running.device import pick_device, repeatable, use_threads
from cahfp_cli.running.evaluation import evaluate, evaluate_onnx
from cahfp_cli.running.latency import latency, latency_onnx, time_calls
from cahfp_cli.training.augment import shifted
from cahfp_cli.training.sgd import Epoch, TrainOptions, steps_per_epoch, train

CPU = torch.device("cpu")
BRIEF = TrainOptions(epochs=1, steps=4, batch_size=32, lr=0.05)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    torch.set_num_threads(1)
    return load_data("digits@train")


def small(seed: int = 0) -> nn.Module:
    return build(ModelSpec(spec="resnet20", args={"width": 0.25}), (1, 8, 8), 10, seed)


def digest(model: nn.Module) -> str:
    arrays = state_arrays(model)
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()


@pytest.mark.parametrize(("name", "width"), [("resnet20", 0.5), ("vgg11", 0.25)])
def test_five_epochs_on_digits_give_more_than_95_percent(name: str, width: float, digits: Dataset) -> None:
    model = build(ModelSpec(spec=name, args={"width": width}), digits.input_shape, 10)
    calls: list[tuple[int, int, Epoch]] = []
    report = train(model, digits, TrainOptions(epochs=5), CPU, lambda *call: calls.append(call))
    assert evaluate(model, load_data("digits@test"), 128, CPU).accuracy > 0.95
    assert [(done, of) for done, of, _ in calls] == [(i, 5) for i in range(1, 6)]
    assert tuple(result for _, _, result in calls) == report.epochs
    assert report.steps == 5 * steps_per_epoch(len(digits), 64) and report.seconds > 0
    assert report.epochs[-1].loss < report.epochs[0].loss and not model.training


def test_training_gives_the_same_bytes_for_the_same_seed_and_leaves_the_random_state(digits: Dataset) -> None:
    def trained(seed: int) -> str:
        model = nn.Sequential(small(), nn.Dropout(0.5))  # dropout draws from the global random state
        train(model, digits, replace(BRIEF, seed=seed), CPU)
        torch.rand(5)
        return digest(model)

    assert trained(1) == trained(1) != trained(2)
    state = torch.get_rng_state()
    train(small(), digits, BRIEF, CPU)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("samples", "size", "steps"), [(10, 4, 3), (9, 4, 2), (8, 4, 2), (3, 1, 3), (1, 4, 0), (2, 4, 1)]
)
def test_a_last_batch_of_one_sample_is_left_out(samples: int, size: int, steps: int) -> None:
    assert steps_per_epoch(samples, size) == steps


def test_steps_replace_epochs_and_go_round_the_data(digits: Dataset) -> None:
    share = Dataset(digits.x[:65], digits.y[:65], 10, "share")
    report = train(small(), share, replace(BRIEF, epochs=50, steps=5), CPU)
    assert report.steps == 5 and len(report.epochs) == 3  # two batches a pass: the 65th sample alone makes none


def test_every_option_has_its_effect(digits: Dataset) -> None:
    base = digest_after(BRIEF, digits)
    changes: list[dict[str, Any]] = [
        {"lr": 0.01}, {"momentum": 0.0}, {"weight_decay": 0.1}, {"schedule": "constant"}, {"label_smoothing": 0.2},
        {"seed": 1}, {"grad_clip": 0.01}, {"batch_size": 16},
    ]  # fmt: skip
    assert len({base, *(digest_after(replace(BRIEF, **change), digits) for change in changes)}) == len(changes) + 1
    assert digest_after(replace(BRIEF, augment=True), digits) == base  # 8x8 images are too small to be shifted


def digest_after(options: TrainOptions, data: Dataset) -> str:
    model = small()
    train(model, data, options, CPU)
    return digest(model)


def test_a_balanced_step_goes_down_the_cross_entropy_of_logits_shifted_by_log_class_shares(digits: Dataset) -> None:
    order = np.argsort(digits.y, kind="stable")  # zeros, some ones, and no other class
    few = make_dataset(digits.x[order[:64]], digits.y[order[:64]], "few", digits.classes)
    counts = np.bincount(few.y, minlength=10)
    mixed = make_dataset(digits.x[:200], digits.y[:200], "mixed", digits.classes)
    for data, shares in ((few, (counts + 1) / 74), (mixed, (np.bincount(mixed.y, minlength=10) + 1) / 210)):
        options = replace(BRIEF, steps=1, batch_size=len(data), momentum=0.0, weight_decay=0.0, balanced=True)
        trained, other = small(), small().train()
        train(trained, data, replace(options, schedule="constant"), CPU)
        loss = nn.functional.cross_entropy(
            other(torch.from_numpy(data.x)) + torch.from_numpy(np.log(shares)).float(), torch.from_numpy(data.y)
        )
        loss.backward()
        for own, reference in zip(trained.parameters(), other.parameters(), strict=True):
            assert torch.allclose(own, reference - options.lr * reference.grad, atol=1e-5)


def test_shifts_move_images_and_bring_in_zeros() -> None:
    x = np.random.default_rng(0).random((40, 2, 16, 24), np.float32) + 1
    moved = shifted(x, np.random.default_rng(1))
    assert moved.shape == x.shape and moved.dtype == x.dtype
    for before, after in zip(x, moved, strict=True):
        down, right = (int(n) for n in next(iter(np.argwhere(after[0] == before[0, 8, 12]))) - (8, 12))
        assert abs(down) <= 2 and abs(right) <= 3
        rows, columns = slice(max(down, 0), 16 + min(down, 0)), slice(max(right, 0), 24 + min(right, 0))
        back_rows = slice(max(-down, 0), 16 + min(-down, 0))
        back_columns = slice(max(-right, 0), 24 + min(-right, 0))
        assert np.array_equal(after[:, rows, columns], before[:, back_rows, back_columns])
        assert np.count_nonzero(after) == before[:, back_rows, back_columns].size


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lr": 0.0}, "lr must be positive"), ({"lr": math.nan}, "lr must be"), ({"epochs": 0}, "epochs must be"),
        ({"steps": 0}, "steps must be"), ({"batch_size": 0}, "batch-size"), ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -1.0}, "weight-decay"), ({"schedule": "step"}, "schedule"), ({"seed": -1}, "seed"),
        ({"label_smoothing": 1.0}, "label-smoothing"), ({"grad_clip": 0.0}, "grad-clip"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_usage_errors(change: dict[str, Any], says: str, digits: Dataset) -> None:
    with pytest.raises(UsageError, match=says):
        train(small(), digits, replace(BRIEF, **change), CPU)


def linear(outputs: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))


def test_a_loss_that_is_not_finite_names_the_step_and_the_remedy(digits: Dataset) -> None:
    with pytest.raises(InputError, match=r"in epoch \d+, step \d+\. Try a smaller --lr than 1e\+29"):
        train(linear(), digits, replace(BRIEF, lr=1e29, steps=60), CPU)
    with pytest.raises(InputError, match=r"training left NaN or Inf in '1\.weight'"):
        train(linear(), replace(digits, x=digits.x * np.float32(1e12)), replace(BRIEF, lr=9e29, steps=1), CPU)


def test_models_and_data_that_do_not_fit_are_input_errors(digits: Dataset) -> None:
    wrong = make_dataset(np.zeros((4, 1, 9, 9), np.float32), np.arange(4), "nines")
    with pytest.raises(InputError, match="fails on a batch of 4 samples of 1x9x9"):
        train(linear(), wrong, BRIEF, CPU)
    with pytest.raises(InputError, match="fails on a batch of 4 samples of 1x9x9"):
        evaluate(linear(), wrong, 4, CPU)
    with pytest.raises(InputError, match=r"returned \(32, 3\) for 32 samples of 10 classes"):
        train(linear(3), digits, BRIEF, CPU)
    with pytest.raises(InputError, match="no parameters to train"):
        train(nn.Flatten(), digits, BRIEF, CPU)
    with pytest.raises(InputError, match="one sample is too little"):
        train(small(), Dataset(digits.x[:1], digits.y[:1], 10, "one"), BRIEF, CPU)


def test_evaluation_agrees_with_a_direct_computation_for_any_batch_size(digits: Dataset) -> None:
    model = small().train()
    results = [evaluate(model, digits, size, CPU) for size in (7, 500, 5000)]
    assert model.training
    with torch.inference_mode():
        logits = model.eval()(torch.from_numpy(digits.x)).double()
    y = torch.from_numpy(digits.y)
    for result in results:
        assert result.samples == len(digits)
        assert result.accuracy == pytest.approx(float((logits.argmax(1) == y).double().mean()))
        assert result.loss == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)


def test_evaluation_of_a_model_that_gives_nan_is_an_input_error(digits: Dataset) -> None:
    model = linear()
    nn.init.constant_(model[1].weight, math.nan)
    with pytest.raises(InputError, match="give a loss of nan"):
        evaluate(model, digits, 100, CPU)


def save_onnx(path: Path, model: nn.Sequential, batch: int | str = "batch", classes: int = 10) -> None:
    weight, bias = (p.detach().numpy() for p in model[1].parameters())
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("Gemm", ["flat", "w", "b"], ["y"], transB=1)],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    model_proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model_proto, path)


@pytest.mark.parametrize("batch", ["batch", 1, 8])
def test_an_onnx_file_measures_like_its_module(batch: int | str, digits: Dataset, tmp_path: Path) -> None:
    model = linear()
    save_onnx(tmp_path / "m.onnx", model, batch)
    data = Dataset(digits.x[:101], digits.y[:101], 10, "part")
    expected, found = evaluate(model, data, 32, CPU), evaluate_onnx(tmp_path / "m.onnx", data, 32, threads=1)
    assert found.accuracy == expected.accuracy and found.samples == 101
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert latency_onnx(tmp_path / "m.onnx", threads=1, runs=3).median_ms > 0


def test_an_onnx_file_that_cannot_be_measured_says_why(digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(InputError, match="no such file"):
        evaluate_onnx(path, digits, 32, threads=1)
    path.write_bytes(b"not onnx")
    with pytest.raises(InputError, match="ONNX Runtime does not load it"):
        evaluate_onnx(path, digits, 32, threads=1)
    save_onnx(path, linear(3), classes=3)
    with pytest.raises(InputError, match=r"gives \(32, 3\) for 32 samples of 10 classes"):
        evaluate_onnx(path, digits, 32, threads=1)
    save_onnx(path, linear())
    wide = make_dataset(np.zeros((4, 1, 9, 9), np.float32), np.arange(4), "nines")
    with pytest.raises(InputError, match=r"takes samples of 1x8x8 tensor\(float\), the data has 1x9x9 float32"):
        evaluate_onnx(path, wide, 32, threads=1)


def test_latency_counts_the_timed_calls_only() -> None:
    calls: list[int] = []
    result = time_calls(lambda: calls.append(1), runs=10, warm_up=3)
    assert len(calls) == 13 and result.runs == 10 and 0 <= result.median_ms <= result.p90_ms
    assert latency(small(), (1, 8, 8), CPU, runs=3).median_ms > 0
    with pytest.raises(InputError, match="fails on one sample of 3x8x8"):
        latency(small(), (3, 8, 8), CPU, runs=3)


def test_devices_are_found_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == CPU
    for name, says in (("cuda", "finds no cuda device"), ("mps", "finds no mps device"), ("tpu", "no device 'tpu'")):
        with pytest.raises(UsageError, match=says):
            pick_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "mps"


def test_repeatable_restores_random_state_and_settings_even_after_an_error() -> None:
    state = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with pytest.raises(KeyError), repeatable(7, CPU):
            assert torch.are_deterministic_algorithms_enabled()
            drawn.append(torch.rand(3))
            raise KeyError
    assert torch.equal(*drawn) and torch.equal(state, torch.get_rng_state())
    assert not torch.are_deterministic_algorithms_enabled()


def test_threads_are_set_or_left() -> None:
    before = torch.get_num_threads()
    use_threads(None)
    assert torch.get_num_threads() == before
    use_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    use_threads(before)
