"""Checkpoints as people have them: a network's tensors under a wrapper's names, or without batch counters.

What is changed here are names, never numbers: a fitted checkpoint reads as the one that the network itself would have
saved, and has that one's digest.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.checkpoint.safetensors_file import TensorInfo
from cahfp_cli.checkpoint.sharded import Tensors
from cahfp_cli.errors import InputError

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that torch's own wrappers add: DataParallel and averaging, compile, sharding, checkpointing."""
COUNTER, MEAN = "num_batches_tracked", "running_mean"
MOST_TRIED, MOST_NAMED = 100, 3
Renaming = dict[str, str | None]
"""From names in a file to a network's; None for what is left out."""


@dataclass(frozen=True)
class Fitted:
    """A checkpoint whose tensors go by other names.

    sources: by name here, that in `file`; None for a batch counter that the file lacks, which reads as zero. left_out:
    names in the file of tensors that are not the network's.
    """

    file: Tensors
    tensors: Mapping[str, TensorInfo]
    sources: Mapping[str, str | None]
    left_out: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.file.metadata

    def read_rows(self, name: str, first: int, last: int) -> Array:
        """See `SafetensorsFile.read_rows`."""
        source = self.sources.get(name)
        if source is None and name in self.sources:
            return np.zeros((), np.int64)
        return self.file.read_rows(name if source is None else source, first, last)


def fit(file: Tensors, expected: Collection[str]) -> Tensors:
    """The checkpoint by the names that a network's tensors have, `expected`; `file` itself where those are its own.

    Tried are the names without wrappers, and a beginning that the file's names, or the network's, have in common.
    Counters of batches that are missing beside their running mean are taken for zero, as torch does. Whether everything
    is there and fits is not looked at.
    Raises: InputError: two beginnings fit equally well.
    """
    names = _best(list(file.tensors), expected, file.path)
    found = {new: old for old, new in names.items() if new is not None}
    counters = [name for name in expected if name not in found and _beside_mean(name, found)]
    left_out = tuple(old for old, new in names.items() if new is None)
    if not counters and all(old == new for old, new in names.items()):
        return file
    end = max((info.end for info in file.tensors.values()), default=0)
    infos = {new: replace(file.tensors[old], name=new) for new, old in found.items()}
    infos |= {name: TensorInfo(name, "I64", (), end, end + 8) for name in counters}
    return Fitted(file, infos, {**found, **dict.fromkeys(counters)}, left_out)


def under(file: Tensors, key: str) -> Tensors | None:
    """The tensors whose names start with `key` and a dot, without it; None if there are none."""
    prefix = f"{key}."
    own = {name.removeprefix(prefix): name for name in file.tensors if name.startswith(prefix)}
    infos = {new: replace(file.tensors[old], name=new) for new, old in own.items()}
    return Fitted(file, infos, own, ()) if own else None


def beginnings(names: Collection[str]) -> list[str]:
    """What the names of several tensors start with, each up to its first dot."""
    return sorted({name.partition(".")[0] for name in names if "." in name})


def _best(found: list[str], expected: Collection[str], path: Path) -> Renaming:
    """The renaming that gives most expected names; of equally good ones that which changes nothing."""
    inside = [name for name in found if name.partition(".")[0] in WRAPPERS] or found
    unwrapped = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in inside}
    longest = sorted(expected, key=lambda name: (-len(name), name))  # says most about what stands before it
    renamings: dict[str, Renaming] = {"": dict(zip(found, found, strict=True))}
    for prefix in _prefixes(list(unwrapped.values()), longest):
        renamings[f"{prefix}*"] = {
            **dict.fromkeys(found),
            **{old: name.removeprefix(prefix) for old, name in unwrapped.items() if name.startswith(prefix)},
        }
    lacking = _prefixes(longest, sorted(unwrapped.values(), key=lambda name: (-len(name), name)))
    if len(lacking) == 1 and lacking[0]:
        renamings[f"+{lacking[0]}"] = {
            **dict.fromkeys(found),
            **{old: lacking[0] + name for old, name in unwrapped.items()},
        }
    wanted = set(expected)
    hits = {label: _hits(renaming, wanted) for label, renaming in renamings.items()}
    best = [label for label in renamings if hits[label] == max(hits.values())]
    if best[0] and len(best) > 1:
        several = " and ".join(repr(label.rstrip(".*")) for label in best[:MOST_NAMED])
        raise InputError(f"{path}: it holds the network under several names, {several}: choose one by --key.")
    return renamings[best[0]]


def _hits(renaming: Renaming, wanted: Collection[str]) -> int:
    """How many wanted names it gives; none where two tensors would get the same."""
    given = [new for new in renaming.values() if new is not None]
    return sum(new in wanted for new in given) if len(set(given)) == len(given) else -1


def _prefixes(longer: list[str], shorter: list[str]) -> list[str]:
    """What stands before a name of `shorter` in names of `longer`: of the first that is found there at all."""
    for name in shorter[:MOST_TRIED]:
        tail = f".{name}"
        prefixes = {other[: -len(name)] for other in longer if other == name or other.endswith(tail)}
        if prefixes:
            return sorted(prefixes)[:MOST_TRIED]
    return []


def _beside_mean(name: str, found: Collection[str]) -> bool:
    module, dot, last = name.rpartition(".")
    return last == COUNTER and f"{module}{dot}{MEAN}" in found
