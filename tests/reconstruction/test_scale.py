"""A thousand clients in one run of the installed command, with few files open at a time."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.clients_on_disk import Fleet, fleet, load

CLIENTS = 1000
OPEN_FILES = 256  # stricter than the usual soft limit of 1,024, and hard: the command cannot raise it
BINARY = Path(sys.executable).with_name("cahfp")


def filled(it: Fleet, number: int, name: str) -> np.ndarray:
    """The global tensor in float64, with what a client sent in its places."""
    entry, whole = it.maps[number].tensors[name], it.tensors[name].astype(np.float64)
    lists = [np.arange(n) if axis is None else axis for axis, n in zip(entry.axes, entry.shape, strict=True)]
    whole[np.ix_(*lists) if lists else ()] = it.submodels[number][name]
    return whole


def mean(it: Fleet, name: str) -> np.ndarray:
    """What `fill` means: all clients completed with the global values, then averaged by their examples."""
    shares = np.array(it.examples) / sum(it.examples)
    values = [filled(it, number, name) for number in range(CLIENTS)]
    if name.endswith("num_batches_tracked"):
        return np.max(values, axis=0)
    result = np.tensordot(shares, values, axes=1)
    if name.endswith("running_var"):
        partner = name.replace("running_var", "running_mean")
        apart = np.array([filled(it, number, partner) for number in range(CLIENTS)]) - mean(it, partner)
        result = result + np.tensordot(shares, apart**2, axes=1)
    return result


@pytest.mark.skipif(not BINARY.exists(), reason="the package is not installed")
def test_a_thousand_clients_under_a_low_limit_of_open_files_equal_the_float64_mean(tmp_path):
    it = fleet(tmp_path, seed=6, clients=CLIENTS)
    output = tmp_path / "merged.safetensors"
    names = [folder.name for folder in it.folders]
    done = subprocess.run(
        [BINARY, "reconstruct", it.checkpoint.name, *names, "-o", output.name, "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES)),
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["clients"]) == CLIENTS
    merged = load(output)
    assert merged.keys() == it.tensors.keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor, mean(it, name), rtol=2e-6, atol=1e-6, err_msg=name)
