"""State dicts in PyTorch's own file format, read without running what a pickle may hold."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.models.tensors import EXTRA_STATE, to_array

USUAL_KEYS = frozenset({"state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params"})
"""Where training code keeps the network itself, beside averages of it."""
MOST_LEVELS = 3
MOST_NAMED = 12
REBUILDERS = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}
PLAIN_DATA: list[Any] = [
    (SimpleNamespace, "argparse.Namespace"),
    *((PurePath, f"pathlib.{name}") for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    np.dtype,
    np.ndarray,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
    *((build, f"numpy.{part}.multiarray.{name}") for name, build in REBUILDERS.items() for part in ("core", "_core")),
]
"""Data and no code that training scripts keep beside the weights: options, and NumPy's numbers."""


@dataclass(frozen=True)
class StateDict:
    """The tensors of a file, as arrays by name. key: where in the file they were, "" for the file itself. others: other
    state dicts there. left_out: entries that are no tensors."""

    arrays: dict[str, Array]
    key: str
    others: tuple[str, ...]
    left_out: tuple[str, ...]


def read_state_dict(path: Path, key: str | None = None) -> StateDict:
    """The state dict in a file that `torch.save` wrote: the file itself, or what stands under `key` in it, without one
    under a usual key.

    Raises: InputError: the file is missing or damaged, needs code to be read, or holds something else; UsageError: it
        holds several state dicts and no `key` chooses one, or none under `key`.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    content = unpickled(path)
    found = dict(state_dicts(content))
    if not found:
        kind = type(content).__name__
        raise InputError(f"{path}: holds a {kind} without tensors by name, expected a dict of tensors (a state dict).")
    chosen = choose(found, key, path)
    entries = found[chosen]
    arrays = {}
    for name, value in entries.items():
        if isinstance(value, torch.Tensor):
            try:
                arrays[name] = to_array(value, name)
            except InputError as error:
                raise InputError(f"{path}: {error}\nSave the state dict of the plain float network.") from None
    left_out = tuple(name for name, value in entries.items() if not isinstance(value, torch.Tensor))
    return StateDict(arrays, chosen, tuple(name for name in found if name != chosen), left_out)


def unpickled(path: Path) -> Any:
    """What the file holds, made of tensors and plain data only."""
    damaged = InputError(f"{path}: not a file that torch.save wrote, or a damaged one.")
    try:
        if holds_script(path):
            raise InputError(
                f"{path}: is a TorchScript archive, which holds code. Convert it:\n"
                "  torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
            )
        check_archive(path)
        # an open file, since torch.load judges paths by their names
        with torch.serialization.safe_globals(PLAIN_DATA), warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # says in other words what we say below
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|class|global) (\S+) ", str(error))
        if "weights" not in str(error).lower():
            raise damaged from error
        what = f" ({code.group(1)[:80]})" if code and code.group(1).isprintable() else ""
        raise InputError(
            f"{path}: is a pickle that holds code, not only tensors{what}, and is not read. Where you trust it, "
            "convert it:\n  torch.save(torch.load(FILE, weights_only=False).state_dict(), 'weights.pt')"
        ) from error
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        OSError,
        AssertionError,
    ) as error:
        raise damaged from error
    except (NotImplementedError, RecursionError, ImportError, OverflowError, zipfile.BadZipFile) as error:
        raise damaged from error


def holds_script(path: Path) -> bool:
    """Whether it is an archive of `torch.jit.save`, by the constants that only these have."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def check_archive(path: Path) -> None:
    """Raises: ValueError: a zip archive that would become larger than its file; torch.save never compresses."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("compressed")


def state_dicts(content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every state dict in what a file holds, with its keys joined by dots: mappings of names to tensors.

    Of a mapping that holds both tensors and state dicts, such as a training state with a random state in it, it is the
    latter, unless names with dots say that it is a network's own.
    """
    own = entries_of(content)
    below = list(nested(own, 1))
    tensors = [name for name, value in own.items() if isinstance(value, torch.Tensor)]
    if tensors and (not below or any("." in name for name in tensors)):
        yield "", own
        return
    yield from below


def nested(entries: Mapping[str, Any], level: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, value in entries.items():
        own = {} if name.endswith(EXTRA_STATE) else entries_of(value)
        if any(isinstance(part, torch.Tensor) for part in own.values()):
            yield name, own
        elif level < MOST_LEVELS:
            yield from ((f"{name}.{key}", found) for key, found in nested(own, level + 1))


def entries_of(value: Any) -> Mapping[str, Any]:
    """A mapping of strings, as which a list of mappings counts too; of anything else an empty one."""
    if isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
        value = {str(number): part for number, part in enumerate(value)}
    return value if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) else {}


def choose(found: Mapping[str, Mapping[str, Any]], key: str | None, path: Path) -> str:
    """The key of the state dict to take. Raises: UsageError: see `read_state_dict`."""
    if key is not None and key in found:
        return key
    if "" in found:  # the file itself; a key is then the beginning of names
        return ""
    usual = [name for name in found if all(part in USUAL_KEYS for part in name.split("."))]
    if key is None and len(usual or found) == 1:
        return next(iter(usual or found))
    there = ", ".join(list(found)[:MOST_NAMED]) + (", ..." if len(found) > MOST_NAMED else "")
    raise UsageError(
        f"{path}: it holds no state dict {key!r}. There are: {there}."
        if key is not None
        else f"{path}: it holds several state dicts: choose one by --key. There are: {there}."
    )
