"""Merge client submodels into one global checkpoint, tensor by tensor and a block of rows at a time.

Memory holds a few blocks of the global checkpoint and one client's part of each, however large the checkpoint and many
the clients are (robust rules need all clients' values of a block, so their blocks are smaller); no client's file stays
open. Whatever the order of the clients, the size of blocks and the number of threads, the result has the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import JsonValue

from cahfp_cli.checkpoint.atomic import atomic_directory, atomic_file, check_file_target, check_folder_target
from cahfp_cli.checkpoint.digest import content_digest, file_sha256, row_blocks
from cahfp_cli.checkpoint.dtypes import FLOATS
from cahfp_cli.checkpoint.fitting import Fitted, fit
from cahfp_cli.checkpoint.metadata import CheckpointMetadata, InputFile, Provenance, metadata_or_none
from cahfp_cli.checkpoint.ownership import foreign_in_shards
from cahfp_cli.checkpoint.safetensors_file import SafetensorsFile, TensorInfo
from cahfp_cli.checkpoint.sharded import ShardedCheckpoint, Tensors, open_checkpoint
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.formats.index_map import listed
from cahfp_cli.reconstruction.blocks import Block, Holders
from cahfp_cli.reconstruction.clients import GREATEST_WEIGHT, Client, Gate, Refusal, read_clients
from cahfp_cli.reconstruction.gate import check_block
from cahfp_cli.reconstruction.in_order import in_order
from cahfp_cli.reconstruction.naming import as_pruned
from cahfp_cli.reconstruction.report import ClientReport, ReconstructionReport, TensorCoverage
from cahfp_cli.reconstruction.round import Round, Step, check_same_tensors
from cahfp_cli.reconstruction.rules import Rule, rule_named
from cahfp_cli.reconstruction.updates import Update, agreements, check_update, clipped, faults_of_factors, measured
from cahfp_cli.reconstruction.writing import Progress, write_checkpoint, write_partial


def reconstruct(
    global_checkpoint: Path,
    submodels: Sequence[Path],
    output: Path,
    *,
    rule: str = "fill",
    trim: float | None = None,
    weights: Mapping[Path, float] | None = None,
    keep_compensation: bool = False,
    skip_invalid: bool = False,
    min_clients: int = 1,
    maps: Path | None = None,
    max_examples: float | None = None,
    max_update: float | None = None,
    clip: float | Literal["median"] | None = None,
    step: Step | None = None,
    partial: bool = False,
    audit: bool = False,
    threads: int = 1,
    force: bool = False,
    provenance: Provenance,
    on_progress: Progress | None = None,
    dry_run: bool = False,
    open_global: Callable[[Path], AbstractContextManager[Tensors]] = open_checkpoint,
) -> ReconstructionReport:
    """Merge the submodel folders into a copy of the global checkpoint, `output`; with `dry_run` only check everything.

    The order of `submodels` does not matter. The output keeps the metadata of the global checkpoint, with `provenance`
    as its own, completed by the inputs that took part. Factors that compensate a submodel for what was removed are
    taken out of its weights before they are merged, or with `keep_compensation` left in.

    Args: global_checkpoint: a file, or an index of shards or its folder, which makes `output` a folder with the same
        shards; someone else's is merged under the names of the network. submodels: folders, and partial aggregates.
        trim: see `rule_named`. weights: by submodel, instead of its recorded num_examples. skip_invalid, min_clients,
        maps, max_examples: see `Gate`. max_update: the norm of a client's update, over that of the weights that it was
        sent, at most. clip: shrink updates to so much, or to the median of the clients. partial: write a partial
        aggregate instead of a checkpoint. audit: measure updates and agreement. open_global: opens the global
        checkpoint and that of the round before, where they may be of another format than safetensors.

    Raises: UsageError: no such rule, a folder listed twice, a weight without a folder, options that do not go together.
        InputError: an input is damaged or does not fit, too few clients are left, or the output exists without `force`;
        nothing is left in its place.
    """
    chosen, step = rule_named(rule, trim), step or Step()
    gate = Gate(skip_invalid, min_clients, maps, GREATEST_WEIGHT if max_examples is None else max_examples)
    _check_options(chosen, step, partial, clip, max_update)
    with (
        open_global(global_checkpoint) as stored,
        nullcontext() if step.before is None else open_global(step.before) as before,
    ):
        checkpoint = as_pruned(stored, submodels, maps)
        sharded = isinstance(checkpoint, ShardedCheckpoint) and not partial
        if sharded:
            check_folder_target(output, force, foreign_in_shards)
        else:
            check_file_target(output, force)
        metadata_or_none(checkpoint, CheckpointMetadata)  # another file of ours is refused before it is read
        digest, *own = in_order(
            lambda file: _checked_digest(checkpoint) if file is None else _sha256(file),
            [None, *_files(stored)],
            threads,
        )
        clients, refused, warnings = read_clients(
            checkpoint, digest, submodels, weights or {}, gate, chosen, keep_compensation, threads
        )
        every = audit or clip is not None or max_update is not None
        clients, updates, moved_too_far = _measured(clients, checkpoint, every, max_update, skip_invalid)
        refused = [*refused, *moved_too_far]
        if len(clients) < max(1, gate.min_clients):
            raise InputError(_too_few(len(clients), gate.min_clients, refused))
        if clip is not None:
            clients = clipped(clients, [update for update in updates if update is not None], clip)
        if before is not None:
            before = fit(before, checkpoint.tensors.keys())
            check_same_tensors(before, checkpoint)
        this = Round(checkpoint, tuple(clients), chosen, step, before, threads)
        covered = tuple(_coverage(this, info) for info in checkpoint.tensors.values() if info.dtype in FLOATS)
        inputs = [InputFile(file=file.path.name, sha256=found) for file, found in zip(_files(stored), own, strict=True)]
        made = _completed(provenance, inputs, clients, weights or {})
        result = None
        cosines: list[float | None] = [None] * len(clients)
        if not dry_run and partial:
            with atomic_file(output, force) as temporary:
                write_partial(temporary, this, digest, keep_compensation, made, on_progress)
        elif not dry_run:
            with (
                atomic_directory(output, force, foreign_in_shards)
                if sharded
                else atomic_file(output, force) as temporary
            ):
                write_checkpoint(temporary, this, made, on_progress)
                merged = temporary / checkpoint.path.name if sharded else temporary
                result = content_digest(merged)
                if audit:
                    with open_checkpoint(merged) as after:
                        cosines = agreements(clients, checkpoint, after)
    total = sum(sum(tensor.counts) for tensor in covered)
    reports = tuple(
        ClientReport(
            client.path, client.weight, client.members, _entries(client) / max(1, total), client.shrink, update, cosine
        )
        for client, update, cosine in zip(clients, updates, cosines, strict=True)
    )
    return ReconstructionReport(
        output,
        rule,
        keep_compensation,
        reports,
        tuple(refused),
        sum(client.members for client in clients),
        covered,
        result,
        not dry_run,
        (*_left_out(checkpoint), *warnings),
    )


def _check_options(
    rule: Rule, step: Step, partial: bool, clip: float | Literal["median"] | None, max_update: float | None
) -> None:
    if partial and rule.of_values is not None:
        raise UsageError(
            f"--partial: the rule {rule.name} needs every client's own values; aggregate by fill or covered."
        )
    if partial and step != Step():
        raise UsageError("--partial: the step of the server is taken where all partial aggregates come together.")
    for name, value in (("--clip", clip), ("--max-update", max_update)):
        if isinstance(value, float | int) and not 0 < value < float("inf"):
            raise UsageError(f"{name} {value}: give a number above 0.")


def _measured(
    clients: Sequence[Client], checkpoint: Tensors, every: bool, max_update: float | None, skip_invalid: bool
) -> tuple[list[Client], list[Update | None], list[Refusal]]:
    """The clients whose updates are sound, with these where `every` one is to be measured. Otherwise only what has
    factors is looked at, whose numbers may be too large without them."""
    found: Sequence[Update | InputError | None]
    found = measured(clients, checkpoint) if every else faults_of_factors(clients, checkpoint)
    kept: list[Client] = []
    updates: list[Update | None] = []
    refused = []
    for client, update in zip(clients, found, strict=True):
        try:
            if isinstance(update, InputError):
                raise update
            if update is not None:
                check_update(client, update, max_update)
        except InputError as error:
            if not skip_invalid:
                raise
            refused.append(Refusal.of(client.path, error))
            continue
        kept.append(client)
        updates.append(update)
    return kept, updates, refused


def _too_few(count: int, least: int, refused: Sequence[Refusal]) -> str:
    message = f"{count} clients passed, and at least {max(1, least)} must."
    return f"{message}\nThe first that did not: {refused[0].reason}" if refused else message


def _files(checkpoint: Tensors) -> list[Tensors]:
    return list(checkpoint.shards.values()) if isinstance(checkpoint, ShardedCheckpoint) else [checkpoint]


def _sha256(file: Tensors) -> str:
    return file.hashed() if isinstance(file, SafetensorsFile) else file_sha256(file.path)


def _left_out(checkpoint: Tensors) -> list[str]:
    """A warning of tensors that are no part of the network."""
    if not isinstance(checkpoint, Fitted) or not checkpoint.left_out:
        return []
    return [f"{checkpoint.path}: left out, being no part of the network: {listed(list(checkpoint.left_out))}."]


def _checked_digest(checkpoint: Tensors) -> str:
    return content_digest(checkpoint, lambda info, block: check_block(checkpoint.path, info, block))


def _completed(
    provenance: Provenance, own: Sequence[InputFile], clients: Sequence[Client], weights: Mapping[Path, float]
) -> Provenance:
    """With the inputs that took part, `own` of the global checkpoint, by their last names and in sorted order, and with
    their given weights."""
    inputs = [*own, *(one for client in clients for one in client.inputs)]
    took_part = {client.path.resolve() for client in clients}
    given: list[JsonValue] = [
        [path.resolve().name, weight] for path, weight in sorted(weights.items()) if path.resolve() in took_part
    ]
    options = {**provenance.options, **({"weights": given} if given else {})}
    ordered = tuple(sorted(inputs, key=lambda one: (one.file, one.sha256)))
    return provenance.model_copy(update={"inputs": ordered, "options": options})


def _coverage(this: Round, info: TensorInfo) -> TensorCoverage:
    holders = Holders(info.name, info.shape, this.clients)
    return coverage_of(info, holders, sum(client.members for client in this.clients))


def coverage_of(info: TensorInfo, holders: Holders, members: int) -> TensorCoverage:
    """How many entries of a tensor how many of so many clients hold."""
    found = np.zeros(members + 1, np.int64)
    for first, last in row_blocks(info):
        counts = holders.histogram(Block(info.name, info.shape, first, last))
        found[: len(counts)] += counts
    return TensorCoverage(info.name, tuple(found.tolist()))


def _entries(client: Client) -> int:
    return sum(int(np.prod(info.shape)) for info in client.tensors.tensors.values() if info.dtype in FLOATS)
