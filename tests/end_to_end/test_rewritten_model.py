"""A model whose code fixes widths, through the command line: pruned, trained, evaluated, exported, merged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.support.commands import run, run_well

CODE = '''
import torch
from torch import nn


class Attention(nn.Module):
    """Four heads and a width of 32 by number; a bias of zeros that is no parameter and is not saved."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96, bias=False), nn.Linear(32, 32)
        self.register_buffer("bias", torch.full((96,), 0.1), persistent=False)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = (self.qkv(x) + self.bias).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (c // 4) ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, c))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.attention = nn.Conv2d(1, 32, 2, 2), Attention()
        self.norm, self.up, self.down = nn.BatchNorm1d(32), nn.Linear(32, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.patches(x).view(x.shape[0], 32, 16).transpose(1, 2)
        x = x + self.attention(x)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, trained for an epoch, scored, and pruned to half its parameters."""
    path = tmp_path_factory.mktemp("rewritten")
    (path / "net.py").write_text(CODE)
    model = ("--model", "net.py:Net")
    run_well("train", *model, "--data", "digits@train", "--epochs", 2, "-o", "global.safetensors", cwd=path)
    run_well(
        "score",
        "global.safetensors",
        *model,
        "--data",
        "digits@train",
        "--samples",
        200,
        "-o",
        "scores.safetensors",
        cwd=path,
    )
    run_well(
        "prune",
        "global.safetensors",
        *model,
        "--scores",
        "scores.safetensors",
        "--params",
        "0.5",
        "-o",
        "half",
        cwd=path,
    )
    return path


def test_groups_are_shown_with_what_is_rewritten(folder: Path) -> None:
    said = run_well("inspect", "global.safetensors", "--model", "net.py:Net", "--groups", "--json", cwd=folder).json
    assert said["kind"] == "channel groups"
    assert said["prunable_share"] > 0.99
    assert {family["name"]: family["groups"] for family in said["families"]} == {
        "patches.weight": 32,
        "attention.qkv.weight": 4,
        "up.weight": 48,
    }
    assert "attention: reshape" in said["rewritten"] and ": view" in said["rewritten"]
    assert said["pinned"] == [{"tensor": "head.bias", "elements": 10, "reason": "output of the model"}]
    human = run_well("inspect", "global.safetensors", "--model", "net.py:Net", "--groups", cwd=folder).stdout
    assert "attention.qkv.weight" in human and "rewritten in a submodel" in human


def test_the_submodel_runs_trains_and_merges(folder: Path) -> None:
    model = ("--model", "net.py:Net")
    whole = run_well("evaluate", "half", *model, "--data", "digits@test", "--json", cwd=folder).json
    exported = run_well("evaluate", "half/model.onnx", "--data", "digits@test", "--json", cwd=folder).json
    assert whole["accuracy"] == exported["accuracy"]
    run_well("train", "half", *model, "--data", "digits@train[0:300]", "--epochs", 1, "-o", "trained", cwd=folder)
    run_well("reconstruct", "global.safetensors", "trained", "-o", "merged.safetensors", cwd=folder)
    before, after = load_file(folder / "global.safetensors"), load_file(folder / "merged.safetensors")
    assert before.keys() == after.keys()
    assert not np.array_equal(before["attention.qkv.weight"], after["attention.qkv.weight"])


@pytest.mark.parametrize(
    ("damage", "culprit"),
    [
        ({"new": 10**9}, "rewrites"),
        ({"new": -5}, "rewrites"),
        ({"module": "nowhere"}, "rewrites"),
        ({"old": None}, "rewrites"),
    ],
)
def test_damaged_rewrites_are_refused(folder: Path, tmp_path: Path, damage: dict[str, object], culprit: str) -> None:
    shutil.copytree(folder / "half", tmp_path / "half")
    path = tmp_path / "half" / "index_map.safetensors"
    with safe_open(path, "numpy") as file:
        about = json.loads(file.metadata()["cahfp"])
    assert about["rewrites"] and about["buffers"].keys() == {"attention.bias"}
    about["rewrites"] = [{**rewrite, **damage} for rewrite in about["rewrites"]]
    save_file(load_file(path), path, {"cahfp": json.dumps(about)})
    refused = run("evaluate", tmp_path / "half", "--model", "net.py:Net", "--data", "digits@test", cwd=folder)
    assert refused.code == 3
    assert culprit in refused.stderr and len(refused.stderr.splitlines()) <= 2
