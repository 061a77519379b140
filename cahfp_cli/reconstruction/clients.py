"""Who takes part in a reconstruction, and with which weight: submodel folders and partial aggregates."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cahfp_cli.checkpoint import strict_json
from cahfp_cli.checkpoint.dtypes import Array, raw_bytes
from cahfp_cli.checkpoint.in_memory import TensorsInMemory
from cahfp_cli.checkpoint.metadata import InputFile
from cahfp_cli.checkpoint.safetensors_file import is_size
from cahfp_cli.checkpoint.sharded import Tensors
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.formats.files import REPORT, TENSORS
from cahfp_cli.formats.index_map import IndexMap, without_factors
from cahfp_cli.formats.report import most_bytes
from cahfp_cli.reconstruction.curvature import Curvature, read_curvature
from cahfp_cli.reconstruction.gate import checked_numbers, header_bytes, read_upload
from cahfp_cli.reconstruction.in_order import in_order
from cahfp_cli.reconstruction.partial import Partial, read_partial
from cahfp_cli.reconstruction.rules import RULES, Floats, Rule

LEAST_WEIGHT, GREATEST_WEIGHT = 1e-9, 1e15  # sums and quotients of weights in this range neither overflow nor vanish


@dataclass(frozen=True)
class Client:
    """One that passed: a submodel folder, or a partial aggregate of several clients, at `path`.

    weight: n_k, or the sum of those of an aggregate's clients. tensors: what it brings, closed and reopened to be read.
    members: 1, or how many clients are aggregated. partial, curvature: what weighs it by coordinate. `inputs`: its
    files, for the record. `shrink`: what its update is multiplied with, of weights and of running statistics.
    """

    path: Path
    weight: float
    tensors: Tensors
    index_map: IndexMap
    order: tuple[str, str, float]
    """Content before names, so that the result does not depend on how clients are listed or what they are called."""
    inputs: tuple[InputFile, ...]
    members: int = 1
    partial: Partial | None = None
    curvature: Curvature | None = None
    shrink: tuple[float, float] = (1.0, 1.0)

    def covers(self, name: str) -> bool:
        return name in self.index_map.tensors

    @property
    def by_coordinate(self) -> bool:
        """Whether it weighs differently from coordinate to coordinate."""
        return self.partial is not None or self.curvature is not None

    def weights_of(self, name: str, first: int, last: int) -> float | Floats:
        """Of rows of its tensor: one number, or float64 that broadcasts against the rows."""
        if self.partial is not None:
            return self.partial.weights(name, first, last)
        if self.curvature is not None and self.curvature.weighs(name):
            return self.weight * self.curvature.relative(name, first, last)
        return self.weight

    def counts_of(self, name: str, first: int, last: int) -> int | Array:
        """How many clients hold each coordinate of rows of its tensor: one number, or as `weights_of`."""
        return self.members if self.partial is None else self.partial.counts(name, first, last)


@dataclass(frozen=True)
class Refusal:
    """A client that did not pass the gate, and why, in one line."""

    path: Path
    reason: str

    @staticmethod
    def of(path: Path, error: InputError) -> "Refusal":
        return Refusal(path, " ".join(str(error).split()))


@dataclass(frozen=True)
class Gate:
    """skip_invalid: leave out who does not pass, instead of refusing to go on. min_clients: how many must pass. maps:
    folder of the server's own index maps. max_examples: what a client may at most claim to have trained on."""

    skip_invalid: bool = False
    min_clients: int = 1
    maps: Path | None = None
    max_examples: float = GREATEST_WEIGHT

    def __post_init__(self) -> None:
        if not 0 < self.max_examples <= GREATEST_WEIGHT:
            raise UsageError(f"--max-examples {self.max_examples}: give a number above 0, at most {GREATEST_WEIGHT:g}.")


def read_clients(
    checkpoint: Tensors,
    digest: str,
    paths: Sequence[Path],
    weights: Mapping[Path, float],
    gate: Gate,
    rule: Rule = RULES["fill"],
    keep_compensation: bool = False,
    threads: int = 1,
) -> tuple[list[Client], list[Refusal], list[str]]:
    """Read and check all clients; returns those that passed, in an order that depends on their content only, those
    that did not, and warnings.

    Args: digest: content digest of `checkpoint`. weights: by path, what takes precedence over recorded num_examples.
        rule: what they are read for. keep_compensation: leave factors in. threads: clients read at a time.
    Raises: UsageError: no client, one twice, a weight for one that is not listed, that is no positive number, of an
        aggregate, or for a rule that does not weigh; an aggregate for such a rule. InputError: without `skip_invalid`,
        a client is not a sound submodel of `checkpoint`.
    """
    _check_paths(paths)
    given = _by_path(paths, weights)
    if given and rule.of_values is not None:
        raise UsageError(f"--weight: all clients count the same by the rule {rule.name}.")
    read: list[tuple[Client, float | None]] = []
    refused: list[Refusal] = []

    def refuse(path: Path, error: InputError) -> None:
        if not gate.skip_invalid:
            raise error
        refused.append(Refusal.of(path, error))

    def tried(path: Path) -> tuple[Client, float | None] | InputError:
        try:
            return _read(checkpoint, digest, path, given.get(path), gate, rule, keep_compensation)
        except InputError as error:
            return error

    for path, found in zip(paths, in_order(tried, paths, threads), strict=True):
        if isinstance(found, InputError):
            refuse(path, found)
        else:
            read.append(found)
    clients = []
    for client, examples in read:
        weight = 1.0 if examples is None else float(examples)
        clients.append(replace(client, weight=weight, order=(*client.order[:2], weight)))
    unknown = [client.path for client, examples in read if examples is None]
    return in_merging_order(clients), refused, _warnings(unknown, len(read)) if rule.of_values is None else []


def _warnings(unknown: Sequence[Path], clients: int) -> list[str]:
    """Args: unknown: clients of which nobody says how many examples they were trained on."""
    if not unknown or clients < 2:
        return []
    if len(unknown) == clients:
        return ["no submodel records num_examples, so all clients count the same; pass --weight DIR=N to weigh them."]
    return [f"{path} records no num_examples and counts as one example; pass --weight {path}=N." for path in unknown]


def _read(
    checkpoint: Tensors,
    digest: str,
    path: Path,
    given: float | None,
    gate: Gate,
    rule: Rule,
    keep_compensation: bool,
) -> tuple[Client, float | None]:
    """One client, and the number of examples that it counts for, if that is known."""
    if path.is_file():
        if given is not None:
            raise UsageError(f"--weight {path}: a partial aggregate has the weights of its clients.")
        if rule.of_values is not None:
            raise UsageError(f"{path}: the rule {rule.name} needs every client's own values, not an aggregate.")
        partial = read_partial(checkpoint, digest, path)
        if partial.keep_compensation != keep_compensation:
            kept = "with" if partial.keep_compensation else "without"
            raise InputError(f"{path}: it was aggregated {kept} --keep-compensation; do the same here.")
        if partial.by_curvature and rule.previous_counts:
            raise InputError(f"{path}: it was aggregated by curvature, which the rule {rule.name} cannot take.")
        own = (InputFile(file=path.name, sha256=partial.sha256),)
        client = Client(
            path,
            partial.weight,
            partial,
            partial.index_map,
            (partial.sha256, "", 0.0),
            own,
            partial.members,
            partial,
        )
        _check_examples(path, partial.weight, gate.max_examples * partial.members)
        return client, partial.weight
    upload = read_upload(checkpoint, digest, path, gate.maps)
    examples = given or upload.metadata.num_examples or _reported_examples(path, checkpoint)
    if given is None and examples is not None:
        _check_examples(path, examples, gate.max_examples)
    index_map = without_factors(upload.index_map) if keep_compensation else upload.index_map
    room = header_bytes(checkpoint)
    curvature = read_curvature(path, upload.file, index_map, room) if rule.by_curvature else None
    name = path.resolve().name
    inputs = tuple(InputFile(file=f"{name}/{file}", sha256=found) for file, found in sorted(upload.sha256.items()))
    if curvature is not None:
        inputs = (*inputs, InputFile(file=f"{name}/{curvature.file.path.name}", sha256=curvature.sha256))
    order = (upload.sha256[TENSORS], map_key(upload.index_map), 0.0)
    return Client(path, 1.0, upload.file, index_map, order, inputs, curvature=curvature), examples


def client_in_memory(
    checkpoint: Tensors, tensors: TensorsInMemory, index_map: IndexMap, map_key: str, num_examples: int
) -> Client:
    """A client whose tensors have the names, shapes and dtypes of an index map that is the server's own; it is merged
    as from a folder.

    Args: map_key: of the index map, see `map_key`.
    Raises: InputError: the numbers do not pass the gate.
    """
    sha256, weight = checked_numbers(tensors, index_map, checkpoint), float(num_examples)
    inputs = (InputFile(file=f"{tensors.path.name}/{TENSORS}", sha256=sha256),)
    return Client(tensors.path, weight, tensors, index_map, (sha256, map_key, weight), inputs)


def in_merging_order(clients: Iterable[Client]) -> list[Client]:
    """Sums are taken in this order, whatever that of the arguments is."""
    return sorted(clients, key=lambda client: (client.order, str(client.path)))


def _check_examples(path: Path, examples: float, most: float) -> None:
    if examples > most:
        raise InputError(f"{path}: its num_examples is larger than {most:g}; pass --weight {path}=N.")


def map_key(index_map: IndexMap) -> str:
    """sha256 of the indices and factors of all tensors and axes, whatever the file that they came in."""
    digest = hashlib.sha256()
    for name, entry in sorted(index_map.tensors.items()):
        whole = [indices is None for indices in entry.axes]
        digest.update(json.dumps([name, entry.submodel_shape, whole]).encode())
        for indices in entry.axes:
            digest.update(b"" if indices is None else raw_bytes(indices))
        if entry.factors:
            digest.update(json.dumps({"factors": [along is not None for along in entry.factors]}).encode())
        for along in entry.factors:
            digest.update(b"" if along is None else raw_bytes(along))
    return digest.hexdigest()


def _check_paths(paths: Sequence[Path]) -> None:
    if not paths:
        raise UsageError("no submodel folder is given; name at least one.")
    seen: dict[Path, Path] = {}
    for path in paths:
        first = seen.setdefault(path.resolve(), path)
        if first is not path:
            raise UsageError(f"{path}: this folder is listed twice; name each client once.")


def _by_path(paths: Sequence[Path], weights: Mapping[Path, float]) -> dict[Path, float]:
    listed_as = {path.resolve(): path for path in paths}
    result = {}
    for path, weight in weights.items():
        if path.resolve() not in listed_as:
            raise UsageError(f"--weight names {path}, which is not one of the submodel folders.")
        if not LEAST_WEIGHT <= weight <= GREATEST_WEIGHT:
            raise UsageError(
                f"--weight {path}={weight}: a weight is a number from {LEAST_WEIGHT:g} to {GREATEST_WEIGHT:g}."
            )
        result[listed_as[path.resolve()]] = float(weight)
    return result


def _reported_examples(folder: Path, checkpoint: Tensors) -> int | None:
    path = folder / REPORT
    if not path.is_file():
        return None
    report: Any = strict_json.read(
        path,
        most_bytes(checkpoint),
        too_large=f"it is larger than any report of ours on such a submodel; pass --weight {folder}=N and remove it.",
        damaged=f"Make the report again, or pass --weight {folder}=N.",
    )
    count = report.get("num_examples") if isinstance(report, dict) else None
    if count is not None and not (is_size(count) and count > 0):
        raise InputError(f"{path}: num_examples must be a positive integer; pass --weight {folder}=N.")
    return count
