"""Networks that read tokens: the type of the data reaches every command, and the files say it."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.commands import Done, run_here

CODE = """
import torch
from torch import nn

class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.mix = nn.Linear(8, 16)
        self.last = nn.Linear(16, 3)

    def forward(self, tokens):
        return self.last(torch.relu(self.mix(self.words(tokens))).mean(1))

def make():
    return Reader()

class Either(Reader):
    def forward(self, tokens):
        return super().forward(tokens.long())

def either():
    return Either()
"""
PREDICT = ("--profile", "raspberry-pi-4", "--json")


@dataclass(frozen=True)
class Tokens:
    """A trained network of tokens: its folder, and the options that every command needs."""

    folder: Path
    model: tuple[str, str]
    data: tuple[str, str]

    def run(self, command: str, *arguments: object) -> Done:
        done = run_here(*command.split(), *arguments, *self.model)
        assert done.code == 0, done.stderr
        return done


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "reader.py").write_text(CODE)
    x = np.random.default_rng(0).integers(0, 12, (90, 5))
    np.savez(folder / "data.npz", x=x, y=x[:, 0] % 3, classes=3)
    made = Tokens(folder, ("--model", f"{folder / 'reader.py'}:make"), ("--data", f"npz:{folder / 'data.npz'}"))
    made.run("train", "-o", folder / "global.safetensors", *made.data, "--epochs", 1)
    theirs = load_file(folder / "global.safetensors")
    save_file(theirs, folder / "theirs.safetensors")
    made.run("score", folder / "global.safetensors", "-o", folder / "scores.safetensors", *made.data)
    pruned = ("--scores", folder / "scores.safetensors", "--macs", 0.6, "--calibration", made.data[1])
    made.run("prune", folder / "global.safetensors", *pruned, "-o", folder / "small")
    return made


def record(path: Path) -> dict[str, object]:
    with safe_open(path, "np") as file:
        return dict(json.loads(file.metadata()["cahfp"]))


def test_files_of_a_token_network_say_what_it_reads(tokens: Tokens) -> None:
    for name in ("global.safetensors", "scores.safetensors", "small/submodel.safetensors"):
        assert record(tokens.folder / name)["input_dtype"] == "int64", name
    session = onnxruntime.InferenceSession(tokens.folder / "small" / "model.onnx")
    assert session.get_inputs()[0].type == "tensor(int64)"
    assert session.get_modelmeta().custom_metadata_map["cahfp.input_dtype"] == "int64"


def test_the_onnx_file_of_a_token_network_computes_what_its_tensors_say(tokens: Tokens) -> None:
    full, small = (
        load_file(tokens.folder / "global.safetensors"),
        load_file(tokens.folder / "small/submodel.safetensors"),
    )
    assert len(small["mix.bias"]) < len(full["mix.bias"])
    x = np.random.default_rng(1).integers(0, 12, (7, 5))
    found = onnxruntime.InferenceSession(tokens.folder / "small" / "model.onnx").run(None, {"input": x})[0]
    words = small["words.weight"].numpy()[x]
    hidden = np.maximum(words @ small["mix.weight"].numpy().T + small["mix.bias"].numpy(), 0).mean(1)
    np.testing.assert_allclose(found, hidden @ small["last.weight"].numpy().T + small["last.bias"].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "command",
    ["inspect --groups --json", "profile predict --profile raspberry-pi-4 --json"],
    ids=["inspect", "predict"],
)
@pytest.mark.parametrize(
    ("file", "more"),
    [
        ("global.safetensors", ()),
        ("small", ()),
        ("theirs.safetensors", ("--input-shape", "5", "--classes", "3", "--input-dtype", "int64")),
    ],
    ids=["ours", "submodel", "theirs"],
)
def test_commands_without_data_read_what_the_file_or_the_option_says(
    tokens: Tokens, command: str, file: str, more: tuple[str, ...]
) -> None:
    said = tokens.run(command, tokens.folder / file, *more).json
    assert said.get("groups") or said["macs"] > 0


def test_a_spec_without_a_file_takes_the_option(tokens: Tokens) -> None:
    spec = tokens.model[1]
    said = run_here("profile", "predict", spec, "--input-shape", "5", "--input-dtype", "int64", *PREDICT)
    assert said.json["macs"] == 5 * 8 * 16 + 16 * 3


def test_data_or_scores_say_it_for_someone_elses_checkpoint(tokens: Tokens, tmp_path: Path) -> None:
    theirs = (tokens.folder / "theirs.safetensors", "--input-shape", "5", "--classes", "3")
    tokens.run("evaluate", *theirs, *tokens.data)
    tokens.run("score", *theirs, *tokens.data, "-o", tmp_path / "s.safetensors")
    tokens.run(
        "prune", *theirs, "--scores", tmp_path / "s.safetensors", "--keep", 0.5, "--no-onnx", "-o", tmp_path / "m"
    )
    assert record(tmp_path / "m" / "submodel.safetensors")["input_dtype"] == "int64"
    tokens.run("train", tmp_path / "m", *tokens.data, "--steps", 1, "-o", tmp_path / "trained")
    tokens.run("evaluate", tmp_path / "trained", *tokens.data)


def test_a_checkpoint_from_before_the_type_was_recorded_takes_that_of_the_data(tokens: Tokens, tmp_path: Path) -> None:
    about = record(tokens.folder / "global.safetensors")
    del about["input_dtype"]
    save_file(
        load_file(tokens.folder / "global.safetensors"), tmp_path / "old.safetensors", {"cahfp": json.dumps(about)}
    )
    tokens.run("score", tmp_path / "old.safetensors", *tokens.data, "-o", tmp_path / "s.safetensors")


def test_data_of_another_type_are_refused_and_the_option_is_named(tokens: Tokens, tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", x=np.ones((30, 5), np.float32), y=np.arange(30) % 3)
    real = ("--data", f"npz:{tmp_path / 'real.npz'}")
    refused = run_here("evaluate", tokens.folder / "global.safetensors", *real, *tokens.model)
    assert refused.code == 3
    assert "samples of float32 do not fit the model, which takes int64" in refused.stderr
    assert "--input-dtype float32" in refused.stderr
    either = ("--model", f"{tokens.folder / 'reader.py'}:either", "--input-dtype", "float32")
    assert run_here("evaluate", tokens.folder / "global.safetensors", *real, *either).code == 0


def test_an_unknown_type_and_one_for_a_submodel_folder_are_usage_errors(tokens: Tokens) -> None:
    for file, dtype in (("global.safetensors", "int8"), ("global.safetensors", ""), ("small", "int64")):
        refused = run_here("inspect", tokens.folder / file, "--groups", "--input-dtype", dtype, *tokens.model)
        assert refused.code == 2, refused.stderr


def test_a_simulation_of_tokens_runs_and_its_checkpoint_says_so(tokens: Tokens, tmp_path: Path) -> None:
    experiment = {"methods": ["cahfp", "taylor"], "partitions": ["iid"], "rounds": 1, "clients_per_round": 2}
    lines = [f"{key} = {json.dumps(value)}" for key, value in experiment.items()]
    data = json.dumps(tokens.data[1])
    lines += ["[model]", f"spec = {json.dumps(tokens.model[1])}", "[data]", f"train = {data}", f"test = {data}"]
    lines += [f"public = {data}", "[[fleet]]", "count = 2", "keep = 0.5", "[selection]", "samples = 8"]
    (tmp_path / "e.toml").write_text("\n".join(lines))
    done = run_here("simulate", tmp_path / "e.toml", "-o", tmp_path / "out")
    assert done.code == 0, done.stderr
    finals = list((tmp_path / "out").rglob("final.safetensors"))
    assert finals
    assert all(record(final)["input_dtype"] == "int64" for final in finals)
