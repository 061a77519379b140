"""A small experiment on `digits`: a slim VGG, six devices of three sizes, seconds a run."""

from pathlib import Path
from typing import Any

from cahfp_cli.checkpoint.metadata import Provenance
from cahfp_cli.federation.experiment import Experiment

PROVENANCE = Provenance(tool="cahfp 0", command="test")
FLEET = [{"count": 2, "keep": 1.0}, {"count": 2, "params": 0.5}, {"count": 2, "params": 0.25}]
TOML = """
partitions = ["dirichlet(0.5)"]
methods = ["heterofl", "cahfp"]
rounds = 2
clients_per_round = 3

[model]
spec = "vgg11"
args = { width = 0.0625 }

[data]
train = "digits@train[0:300]"
test = "digits@test[0:100]"

[[fleet]]
count = 2
keep = 1.0

[[fleet]]
count = 2
params = 0.25

[selection]
rescore_every = 1
samples = 16
"""


def experiment(**changes: Any) -> Experiment:
    """The small experiment with other values for some keys."""
    fields: dict[str, Any] = {
        "model": {"spec": "vgg11", "args": {"width": 0.0625}},
        "data": {"train": "digits@train[0:400]", "test": "digits@test[0:100]"},
        "partitions": ["dirichlet(0.5)"],
        "fleet": FLEET,
        "methods": ["cahfp"],
        "rounds": 3,
        "clients_per_round": 4,
        "selection": {"rescore_every": 2, "samples": 16},
    }
    return Experiment.model_validate({**fields, **changes})


def write_toml(path: Path, text: str = TOML) -> Path:
    path.write_text(text)
    return path
