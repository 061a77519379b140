"""One method on one partition with one seed: rounds, each of them committed before the next begins.

The folder of a run has `state.json`, which names the last committed round and holds all its figures, and the global
checkpoint and the memory of that round. `state.json` is replaced last, so a killed run goes on from a whole round.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from cahfp_cli.checkpoint.atomic import atomic_file
from cahfp_cli.checkpoint.metadata import dump_metadata
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError, first_line
from cahfp_cli.federation.assessment import assess, bound_terms, renew_statistics, unmeasured
from cahfp_cli.federation.bound import Terms
from cahfp_cli.federation.clients import Clients
from cahfp_cli.federation.insulation import insulated
from cahfp_cli.federation.memory import Mask, Memory
from cahfp_cli.federation.methods import METHODS, Method
from cahfp_cli.federation.rounds import first_memory, load_global, run_round, situation_of
from cahfp_cli.federation.setting import Setting
from cahfp_cli.models.checkpoint_io import save_checkpoint

STATE, FINAL = "state.json", "final.safetensors"
Row = dict[str, Any]
MEMORY = ("scores", "scored", "masks")
OF_A_ROUND = re.compile(r"(global|memory)-\d{5,}\.safetensors")
"""Names of files that a later round replaces; any other file in the folder is somebody's own."""


def run(
    setting: Setting,
    name: str,
    start: Path,
    folder: Path,
    fleet: Clients,
    on_round: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Run the method `name` from the checkpoint `start`, or go on where `folder` has a committed round.

    Returns: one row of figures a round. `final.safetensors` is the last global checkpoint with renewed statistics.
    Raises: InputError: the folder's state is damaged.
    """
    experiment, method = setting.experiment, METHODS[name]
    rows = read_rows(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, len(rows))
    if not rows:
        memory = first_memory(setting, method)
        write_first(setting, method, start, global_of(folder, 0), memory)
    else:
        memory = read_memory(memory_of(folder, len(rows)))
    for number in range(len(rows), experiment.rounds):
        started = time.perf_counter()
        before, after = global_of(folder, number), global_of(folder, number + 1)
        outcome = run_round(setting, method, number, before, memory, after, fleet)
        memory = outcome.memory
        row: Row = {
            "round": number + 1,
            "clients": list(outcome.clients),
            "dropped": {str(client): why for client, why in outcome.dropped.items()},
            "unscored": {str(client): why for client, why in outcome.unscored.items()},
            "failed": outcome.failed,
            "loss": outcome.loss,
            "uploaded_bytes": outcome.uploaded + (rows[-1]["uploaded_bytes"] if rows else 0),
            "client_flops": outcome.flops + (rows[-1]["client_flops"] if rows else 0.0),
            "seconds": time.perf_counter() - started,
            "coverage": {tensor: list(counts) for tensor, counts in outcome.coverage.items()},
        }
        if experiment.evaluation.bound_terms:
            row["bound"], row["bound_missing"] = bound_of(setting, number, before, after, outcome.merged)
        if (number + 1) % experiment.evaluation.every == 0 or number + 1 == experiment.rounds:
            nothing = why_nothing([*rows, row])
            found = assess(setting, method, number, after, memory) if nothing is None else unmeasured(setting, nothing)
            row["accuracy"] = {**asdict(found), "by_device": list(found.by_device)}  # as JSON gives it back
        rows.append(row)
        write_memory(memory_of(folder, number + 1), memory)
        with atomic_file(folder / STATE, force=True) as temporary:
            temporary.write_text(json.dumps(rows, allow_nan=False))
        before.unlink(missing_ok=True)
        memory_of(folder, number).unlink(missing_ok=True)
        on_round(row)
    if not (folder / FINAL).exists():
        load_global(setting, global_of(folder, experiment.rounds))
        try:
            renew_statistics(setting, setting.common.network)
        except InputError:  # weights that are too large to compute with: the statistics stay as the rounds left them
            load_global(setting, global_of(folder, experiment.rounds))
        save_checkpoint(folder / FINAL, setting.common.network, setting.common.metadata(), force=True)
    return rows


def why_nothing(rows: Sequence[Row]) -> str | None:
    """Why a run has nothing to be measured: no round of it was merged, so that its network is still that of the start.
    None where one was."""
    if any(row["failed"] is None for row in rows):
        return None
    first = rows[0]
    why = [first["failed"], *(f"client {client}: {fault}" for client, fault in first["dropped"].items())]
    return f"no round was merged; {'; '.join(why[:2])}"


def bound_of(
    setting: Setting, number: int, before: Path, after: Path, merged: Mapping[int, Mask]
) -> tuple[dict[str, float | None], str | None]:
    """The terms of the bound, None for what is not finite, or all of it where the outputs are not; and why."""
    try:
        found = asdict(bound_terms(setting, number, before, after, merged))
    except InputError as error:
        return {field.name: None for field in fields(Terms)}, first_line(error)
    faults = [name for name, value in found.items() if not math.isfinite(value)]
    why = f"not finite: {', '.join(faults)}" if faults else None
    return {name: None if name in faults else value for name, value in found.items()}, why


def write_first(setting: Setting, method: Method, start: Path, target: Path, memory: Memory) -> None:
    """Write the checkpoint that the first round begins with: `start`, which all methods share, or that insulated."""
    if not (method.insulated and setting.experiment.start.cold):
        shutil.copyfile(start, target)
        return
    common = setting.common
    arrays = load_global(setting, start)
    situation = situation_of(setting, 0, arrays, memory)
    masks = np.stack([method.choose(situation, client) for client in range(len(common.devices))])
    arrays = insulated(arrays, common.analysis.groups, masks)
    with atomic_file(target, force=True) as temporary:
        save_arrays(temporary, arrays, dump_metadata(common.metadata()))


def remove_leftovers(folder: Path, number: int) -> None:
    """Remove what a killed run left of rounds other than the last committed one, `number`."""
    committed = {global_of(folder, number), memory_of(folder, number)}
    for path in folder.iterdir():
        if path not in committed and OF_A_ROUND.fullmatch(path.name):
            path.unlink()


def global_of(folder: Path, number: int) -> Path:
    """The global checkpoint after `number` rounds."""
    return folder / f"global-{number:05d}.safetensors"


def memory_of(folder: Path, number: int) -> Path:
    return folder / f"memory-{number:05d}.safetensors"


def read_rows(folder: Path) -> list[Row]:
    """The figures of the committed rounds, none in a new folder. Raises: InputError: not what `run` writes."""
    path = folder / STATE
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
        numbers = [row["round"] for row in rows]
    except (ValueError, TypeError, KeyError):
        numbers = []
    if numbers != list(range(1, len(numbers) + 1)) or not numbers:
        raise InputError(f"{path}: it is damaged; remove {folder} to start this run anew.")
    return list(rows)


def write_memory(path: Path, memory: Memory) -> None:
    with atomic_file(path, force=True) as temporary:
        save_arrays(temporary, {name: getattr(memory, name) for name in MEMORY}, {})


def read_memory(path: Path) -> Memory:
    with open_safetensors(path) as file:
        if set(file.tensors) != set(MEMORY):
            raise InputError(f"{path}: it is damaged; remove its folder to start this run anew.")
        return Memory(**{name: np.array(file.read(name)) for name in MEMORY})
