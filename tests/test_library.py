"""The Python API: the examples of its page run, and it does what the commands do."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import cahfp_cli as cahfp
from tests.support.commands import environment, run_here
from tests.support.fleet import Fleet

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "api.md"
EXAMPLE = re.compile(r"```python( file=(?P<file>\S+))?\n(?P<code>.*?)```", re.DOTALL)


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = list(EXAMPLE.finditer(PAGE.read_text()))
    for example in examples:
        if example["file"]:
            Path(example["file"]).write_text(example["code"])
    code = "\n".join(example["code"] for example in examples if not example["file"])
    assert len(examples[0]["code"].splitlines()) < 40
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    merged = cahfp.load("merged.safetensors", model="mlp.py:make")
    x, y = names["x"], names["y"]
    assert cahfp.evaluate(merged, (x[1200:], y[1200:])).accuracy > 0.85


def test_names_are_all_there_and_nothing_heavy_is_imported_before_they_are_used() -> None:
    code = """
import sys
import cahfp_cli
assert set(cahfp_cli.__all__) <= set(dir(cahfp_cli))
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert all(getattr(cahfp_cli, name) is not None for name in cahfp_cli.__all__)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cahfp.nothing


def test_it_prunes_and_merges_as_the_commands_do(fleet: Fleet, tmp_path: Path) -> None:
    network, scores = cahfp.load(fleet.checkpoint), cahfp.read_scores(fleet.scores)
    cahfp.save_submodel(cahfp.prune(network, scores, cahfp.Budget(macs=cahfp.Share(0.5))), tmp_path / "a", onnx=False)
    command = ("prune", fleet.checkpoint, "--scores", fleet.scores, "--macs", "50%", "--no-onnx", "-o", tmp_path / "b")
    assert run_here(*command).code == 0
    one, other = (load_file(tmp_path / name / "submodel.safetensors") for name in "ab")
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    cahfp.reconstruct(fleet.checkpoint, [tmp_path / "a"], tmp_path / "merged.safetensors")
    whole, merged = load_file(fleet.checkpoint), load_file(tmp_path / "merged.safetensors")
    assert all(whole[name].tobytes() == merged[name].tobytes() for name in whole)


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))


def test_a_live_module_is_left_as_it_was(tmp_path: Path) -> None:
    module = made().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    network = cahfp.load(module, input_shape=(1, 8, 8))
    assert network.classes == 3
    data = (np.random.default_rng(0).random((40, 1, 8, 8), np.float32), np.arange(40) % 3)
    submodel = cahfp.prune(network, cahfp.score(network, data, cahfp.Scoring("l2")), cahfp.Budget(keep=0.5))
    assert submodel.model[0].weight.shape == (4, 1, 3, 3)
    assert module.training and all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    with torch.no_grad():
        submodel.model[0].weight.mul_(2)
    cahfp.save_submodel(submodel, tmp_path / "small")
    again = cahfp.load_submodel(tmp_path / "small", module)
    assert torch.equal(again.model[0].weight, submodel.model[0].weight)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(again.model.eval()(x), submodel.model.eval()(x))


def test_files_of_a_live_module_say_how_to_open_them(tmp_path: Path) -> None:
    network = cahfp.load(made(), input_shape=(1, 8, 8))
    cahfp.save(network, tmp_path / "global.safetensors")
    with pytest.raises(cahfp.UsageError, match=r"live module, Sequential: name the factory"):
        cahfp.load(tmp_path / "global.safetensors")
    refused = run_here("inspect", tmp_path / "global.safetensors", "--groups")
    assert refused.code == 2 and "--model" in refused.stderr
    with pytest.raises(cahfp.InputError, match="exists"):
        cahfp.save(network, tmp_path / "global.safetensors")


def test_what_is_missing_is_said() -> None:
    with pytest.raises(cahfp.UsageError, match="input_shape"):
        cahfp.load(made())
    network = cahfp.load(made(), input_shape=(1, 8, 8))
    scores = cahfp.score(network, how=cahfp.Scoring("l1"))
    for wrong, message in (
        (lambda: cahfp.score(network), "looks at data"),
        (lambda: cahfp.prune(network, scores), "what must hold"),
        (lambda: cahfp.prune(network, budget=cahfp.Budget(keep=0.5)), "what the channels are worth"),
        (lambda: cahfp.prune(network, scores, cahfp.Budget(latency=1e-3)), "needs a profile"),
    ):
        with pytest.raises(cahfp.UsageError, match=message):
            wrong()
    other = cahfp.load(made().half().float(), input_shape=(1, 8, 8))
    with pytest.raises(cahfp.InputError, match="another checkpoint"):
        cahfp.prune(other, scores, cahfp.Budget(keep=0.5))
