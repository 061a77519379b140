"""Submodels load without the memory of the full network, whatever the network's code keeps beside its parameters."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cahfp_cli.checkpoint.metadata import ModelSpec, Provenance, SubmodelMetadata, dump_metadata
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.coupling.analysis import analyse, cut
from cahfp_cli.errors import InputError
from cahfp_cli.formats.index_map import IndexMap, TensorMap
from cahfp_cli.formats.index_map_file import write_index_map
from cahfp_cli.models.skeleton import outline, skeleton
from cahfp_cli.models.spec import build
from cahfp_cli.models.tensors import state_arrays
from cahfp_cli.pruning.submodel import gather_all, load_submodel, make_index_map, write_submodel

CODE = """
import torch
from torch import nn


class Base(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Plain(Base):
    pass


class Tied(Base):
    def __init__(self):
        super().__init__()
        self.third = nn.Linear(4, 8)
        self.third.weight = self.first.weight

    def forward(self, x):
        return super().forward(x) + self.second(torch.relu(self.third(x)))


class Buffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.linspace(0, 1, 4), persistent=False)

    def forward(self, x):
        return super().forward(x + self.shift)


class Attribute(Base):
    def __init__(self):
        super().__init__()
        self.shift = [torch.empty(4).fill_(0.25)]

    def forward(self, x):
        return super().forward(x + self.shift[0])


class Closure(Base):
    def __init__(self):
        super().__init__()
        shift = torch.rand(4)
        self.register_forward_pre_hook(lambda module, given: (given[0] + shift,))


class Random(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(4).normal_(), persistent=False)

    def forward(self, x):
        return super().forward(x + self.shift)


class Reads(Base):
    def __init__(self):
        super().__init__()
        self.scale = float(self.first.weight.abs().max())

    def forward(self, x):
        return super().forward(x * self.scale)


class Drawn(Base):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(4) * 0.02)

    def forward(self, x):
        return super().forward(x + self.shift)


class Huge(nn.Module):
    def __init__(self, width=8, buffer=4):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.register_buffer("mask", torch.zeros(buffer), persistent=False)

    def forward(self, x):
        return self.first(x)
"""
PROVENANCE = Provenance(tool="cahfp 0", command="test")
WITHOUT_PARAMETERS = ["Plain", "Tied", "Buffer", "Drawn"]
"""Those whose parameters need no memory; of the others something depends on random numbers, or on parameters."""


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(CODE)
    return f"{tmp_path / 'net.py'}"


@pytest.mark.parametrize("name", ["Plain", "Tied", "Buffer", "Attribute", "Closure", "Random", "Reads", "Drawn"])
def test_a_loaded_submodel_computes_what_was_cut(name: str, code: str, tmp_path: Path) -> None:
    spec = ModelSpec(spec=f"{code}:{name}")
    network = build(spec, (4,), 3).eval()
    bare = skeleton(spec, (4,), 3)
    assert all(p.is_meta for p in bare.parameters()) == (name in WITHOUT_PARAMETERS)
    assert not any(buffer.is_meta for buffer in bare.buffers())
    analysis = analyse(network, (4,))
    kept = np.ones(analysis.groups.count, dtype=bool)
    kept[::2] = False
    submodel, rewrites = cut(network, analysis, kept)
    arrays = state_arrays(network)
    index_map = make_index_map(arrays, analysis.groups, kept, "0" * 64, rewrites)
    about = SubmodelMetadata(model=spec, input_shape=(4,), classes=3, checkpoint="0" * 64, provenance=PROVENANCE)
    write_submodel(tmp_path / "sub", submodel, gather_all(arrays, index_map), index_map, about, {}, onnx=False)
    loaded = load_submodel(tmp_path / "sub", spec.spec).model
    x = torch.rand(5, 4)
    assert torch.equal(loaded(x), submodel(x))
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    shared = [len(set(map(id, module.parameters()))) for module in (loaded, submodel)]
    assert shared[0] == shared[1]


def hostile(folder: Path, spec: ModelSpec, arrays: dict[str, Any], **shapes: tuple[int, ...]) -> None:
    """A submodel folder whose map claims these shapes of the full network, of which row 0 survives."""
    folder.mkdir()
    entries = {
        name: TensorMap(shape, "F32", (np.zeros(1, np.int32), *(None,) * (len(shape) - 1)))
        for name, shape in shapes.items()
    }
    about = SubmodelMetadata(model=spec, input_shape=(4,), classes=3, checkpoint="0" * 64, provenance=PROVENANCE)
    save_arrays(folder / "submodel.safetensors", arrays, dump_metadata(about))
    write_index_map(folder / "index_map.safetensors", IndexMap("0" * 64, entries), PROVENANCE)


@pytest.mark.parametrize("arguments", [{"width": 10**9}, {"buffer": 10**9}])
def test_what_a_folder_claims_is_checked_before_it_costs_memory(
    arguments: dict[str, int], code: str, tmp_path: Path
) -> None:
    arrays = {"first.weight": np.ones((1, 4), np.float32), "first.bias": np.ones(1, np.float32)}
    spec = ModelSpec(spec=f"{code}:Huge", args=arguments)
    hostile(tmp_path / "sub", spec, arrays, **{"first.weight": (8, 4), "first.bias": (8,)})
    script = (
        "import resource, sys; import torch; from pathlib import Path\n"
        "from cahfp_cli.errors import InputError; from cahfp_cli.pruning.submodel import load_submodel\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    load_submodel(Path(sys.argv[1]), sys.argv[2])\n"
        "except InputError as error:\n"
        "    print(error); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "sub"), spec.spec], capture_output=True, text=True, check=True
    )
    *message, grown = done.stdout.splitlines()
    assert "check --model" in message[0] or "which no file holds" in message[0]
    assert int(grown) < 200_000  # kilobytes; the network would have 4 GB


def test_a_network_in_outline_costs_nothing_and_one_that_reads_its_weights_has_none(code: str) -> None:
    huge = outline(ModelSpec(spec=f"{code}:Huge", args={"width": 10**12}), (4,), 3)
    assert huge is not None and huge.get_parameter("first.weight").shape == (10**12, 4)
    assert outline(ModelSpec(spec=f"{code}:Reads"), (4,), 3) is None


LAZY = """
from torch import nn


def make(reached=True):
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(5))
    if not reached:
        net[0].beside = nn.LazyLinear(2)
    return net


def tokens():
    return nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.LazyLinear(3))
"""


def test_lazy_layers_have_their_widths_once_a_network_is_built(tmp_path: Path) -> None:
    (tmp_path / "lazy.py").write_text(LAZY)
    made = [build(ModelSpec(spec=f"{tmp_path}/lazy.py:make"), (1, 8, 8), 5, seed) for seed in (0, 0, 1)]
    assert {name: tuple(t.shape) for name, t in made[0].named_parameters()} == {
        "0.weight": (4, 1, 3, 3),
        "0.bias": (4,),
        "1.weight": (4,),
        "1.bias": (4,),
        "3.weight": (5, 144),
        "3.bias": (5,),
    }
    assert made[0].training and made[0][1].training and int(made[0][1].num_batches_tracked) == 0
    weights = [net.get_parameter("3.weight") for net in made]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert build(ModelSpec(spec=f"{tmp_path}/lazy.py:tokens"), (6,), 3).get_parameter("2.weight").shape == (3, 24)
    assert outline(ModelSpec(spec=f"{tmp_path}/lazy.py:make"), (1, 8, 8), 5) is not None


@pytest.mark.parametrize(
    ("arguments", "shape", "says"),
    [
        ({"reached": False}, (1, 8, 8), "the lazy layer '0.beside' has no width yet: the forward pass does not reach"),
        ({}, (1, 2, 2), "the lazy layer '1' has no width yet: the model does not run on a sample of 1x2x2"),
    ],
)
def test_lazy_layers_that_stay_without_width_are_refused_by_name(
    arguments: dict[str, bool], shape: tuple[int, ...], says: str, tmp_path: Path
) -> None:
    (tmp_path / "lazy.py").write_text(LAZY)
    with pytest.raises(InputError, match=says):
        build(ModelSpec(spec=f"{tmp_path}/lazy.py:make", args=arguments), shape, 5)
