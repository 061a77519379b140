"""What all tests share: how properties draw examples, and one small fleet made with the installed `cahfp` command.

The fleet is made once: a checkpoint trained on `digits`, its scores, a submodel for each of three unlike devices. Under
pytest-xdist the first worker that needs it makes it, the others wait for a file lock.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings

from tests.support.commands import Done, run_well
from tests.support.fleet import (
    LOCAL_TRAIN,
    PROFILES,
    PRUNE,
    SCORE,
    SHARES,
    TRAIN,
    Clients,
    Fleet,
    keep,
    kept,
    made_once,
    write_share,
)

# The same examples in every run: a property that fails in CI fails everywhere. A busy machine is no failure.
settings.register_profile("everyday", derandomize=True, database=None, deadline=None)
settings.load_profile("everyday")


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """A trained and scored checkpoint with a submodel for each of three unlike devices. Read only."""
    with made_once(tmp_path_factory, "fleet") as (folder, first):
        if first:
            profiles = [part for alias in PROFILES for part in ("--profile", alias)]
            scored = ("global.safetensors", "--scores", "scores.safetensors")
            data = ("--data", "digits@test")
            said = {
                "train": run_well("train", *TRAIN, "-o", "global.safetensors", "--json", cwd=folder),
                "score": run_well(
                    "score", "global.safetensors", *SCORE, "-o", "scores.safetensors", "--json", cwd=folder
                ),
                "prune": run_well("prune", *scored, *profiles, *PRUNE, *data, "-o", "fleet", "--json", cwd=folder),
            }
            keep(folder, said)
        return Fleet(folder, kept(folder))


@pytest.fixture(scope="session")
def clients(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Clients:
    """Each submodel trained on its own device's digits, few and of few classes, and all merged. Read only."""
    with made_once(tmp_path_factory, "clients") as (folder, first):
        if first:
            (folder / "clients").mkdir()

            def train(name: str) -> Done:
                # One of the three exports what it trained; the export takes most of the time.
                export = "--onnx" if name == "stm32h743" else "--no-onnx"
                arguments = (fleet.submodels[name], "--data", f"npz:{folder / name}.npz", *LOCAL_TRAIN, export)
                return run_well("train", *arguments, "-o", f"clients/{name}", "--json", cwd=folder)

            for name in SHARES:
                write_share(folder / f"{name}.npz", name)
            with ThreadPoolExecutor(2) as pool:
                said = dict(zip(SHARES, pool.map(train, SHARES), strict=True))
            merge = [fleet.checkpoint, *(f"clients/{name}" for name in SHARES)]
            said["reconstruct"] = run_well("reconstruct", *merge, "-o", "merged.safetensors", "--json", cwd=folder)
            keep(folder, said)
        return Clients(folder, kept(folder))
