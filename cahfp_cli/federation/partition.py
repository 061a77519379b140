"""Client partitions: which samples each client has, as index arrays that depend on the labels and a seed alone.

`iid` · `dirichlet(ALPHA)`: of each class, shares by a Dirichlet distribution (Hsu et al. 2019; the smaller alpha, the
less alike) · `classes(K)`: shards of K classes a client (McMahan et al. 2017) · `by-column(NAME)`: one client for each
value of a column of an `npz` file, which is how natural users come · `on-device`: nothing is split; each client has
data of its own, which nobody else sees.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.errors import InputError

Indices = NDArray[np.int64]
Kind = Literal["iid", "dirichlet", "classes", "by-column", "on-device"]
ON_DEVICE: Literal["on-device"] = "on-device"
PATTERN = re.compile(r"(iid)|(dirichlet)\((.+)\)|(classes)\((\d+)\)|(by-column)\((\w+)\)")
EXAMPLES = "iid, dirichlet(0.5), classes(2), by-column(user) or on-device"
LEAST_SAMPLES = 4
"""A client with fewer has no batch to speak of: the Dirichlet distribution is drawn again."""
MAX_DRAWS = 1000


@dataclass(frozen=True)
class Partition:
    """alpha, classes, column: for the kind that has it, else None."""

    kind: Kind
    alpha: float | None = None
    classes: int | None = None
    column: str | None = None


def parse_partition(text: str) -> Partition:
    """Raises: ValueError: it is none of the kinds above, or its number is out of range."""
    if text == ON_DEVICE:
        return Partition(ON_DEVICE)
    found = PATTERN.fullmatch(text)
    if found is None:
        raise ValueError(f"partition {text!r} is not understood: write {EXAMPLES}")
    if found[1]:
        return Partition("iid")
    if found[2]:
        try:
            alpha = float(found[3])
        except ValueError:
            alpha = 0.0
        if not 0 < alpha < 1e6:
            raise ValueError(f"partition {text!r}: alpha must be a positive number below 1e6")
        return Partition("dirichlet", alpha=alpha)
    if found[4]:
        if int(found[5]) < 1:
            raise ValueError(f"partition {text!r}: a client has one class or more")
        return Partition("classes", classes=int(found[5]))
    return Partition("by-column", column=found[7])


def split_clients(
    partition: Partition, labels: Indices, clients: int, seed: int, column: NDArray[Any] | None = None
) -> tuple[Indices, ...]:
    """The samples of each client, increasing and disjoint; together they are all samples.

    Args:
        labels: int64 (n,). column: (n,), for `by-column`.
    Raises: InputError: too few samples for so many clients, more classes a client than there are, or users that are not
        as many as clients.
    """
    if len(labels) < clients * LEAST_SAMPLES:
        raise InputError(f"{len(labels)} samples are too few for {clients} clients of at least {LEAST_SAMPLES}.")
    random = np.random.default_rng((seed, 0x9A57))
    if partition.kind == "dirichlet":
        assert partition.alpha is not None
        owner = _dirichlet(labels, clients, partition.alpha, random)
    elif partition.kind == "classes":
        assert partition.classes is not None
        owner = _classes(labels, clients, partition.classes, random)
    elif partition.kind == "by-column":
        owner = _by_column(column, labels, clients, partition.column)
    else:
        owner = np.empty(len(labels), np.int64)
        owner[random.permutation(len(labels))] = np.arange(len(labels)) % clients
    return tuple(np.flatnonzero(owner == client) for client in range(clients))


def _dirichlet(labels: Indices, clients: int, alpha: float, random: np.random.Generator) -> Indices:
    """The client of each sample. Drawn again until every client has LEAST_SAMPLES."""
    owner = np.empty(len(labels), np.int64)
    for _ in range(MAX_DRAWS):
        for label in np.unique(labels):
            members = random.permutation(np.flatnonzero(labels == label))
            shares = random.dirichlet([alpha] * clients)
            cuts = np.floor(np.cumsum(shares)[:-1] * len(members) + 0.5).astype(np.int64)
            for client, part in enumerate(np.split(members, cuts)):
                owner[part] = client
        if np.bincount(owner, minlength=clients).min() >= LEAST_SAMPLES:
            return owner
    raise InputError(
        f"dirichlet({alpha:g}): {MAX_DRAWS} draws left a client with fewer than {LEAST_SAMPLES} samples; "
        "take a larger alpha, fewer clients, or more data."
    )


def _classes(labels: Indices, clients: int, each: int, random: np.random.Generator) -> Indices:
    """The client of each sample: every client gets `each` classes in turn, and an equal part of each."""
    present = np.unique(labels)
    if each > len(present):
        raise InputError(f"classes({each}): the data has only {len(present)} classes.")
    if each * clients < len(present):
        raise InputError(f"classes({each}): {clients} clients cannot cover {len(present)} classes.")
    turns = random.permutation(np.resize(random.permutation(present), clients * each).reshape(clients, each))
    owner = np.empty(len(labels), np.int64)
    for label in present:
        members = random.permutation(np.flatnonzero(labels == label))
        holders = np.flatnonzero((turns == label).any(axis=1))
        for client, part in zip(holders, np.array_split(members, len(holders)), strict=True):
            owner[part] = client
    if np.bincount(owner, minlength=clients).min() < LEAST_SAMPLES:
        raise InputError(f"classes({each}): a client is left with fewer than {LEAST_SAMPLES} samples.")
    return owner


def _by_column(column: NDArray[Any] | None, labels: Indices, clients: int, name: str | None) -> Indices:
    """The client of each sample: the values of the column in sorted order."""
    if column is None or column.shape != labels.shape:
        raise InputError(f"by-column({name}): the data has no column {name!r} with one value a sample.")
    values, owner = np.unique(column, return_inverse=True)
    if len(values) != clients:
        raise InputError(f"by-column({name}): {len(values)} values, but the fleet has {clients} devices.")
    if np.bincount(owner).min() < LEAST_SAMPLES:
        raise InputError(f"by-column({name}): a user has fewer than {LEAST_SAMPLES} samples; leave such users out.")
    return np.asarray(owner.reshape(-1), np.int64)
