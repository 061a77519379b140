"""Merge client submodels into one global checkpoint, tensor by tensor and a block of rows at a time.

Memory holds a few blocks of the global checkpoint and one client's part of each, however large the checkpoint and many
the clients are (robust rules need all clients' values of a block, so their blocks are smaller); no client's file stays
open. Whatever the order of the clients, the size of blocks and the number of threads, the result has the same bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import JsonValue

from cahfp_cli.checkpoint.atomic import atomic_directory, atomic_file, check_file_target, check_folder_target
from cahfp_cli.checkpoint.digest import BLOCK_BYTES, content_digest, file_sha256, row_blocks
from cahfp_cli.checkpoint.dtypes import DTYPES, FLOATS, Array
from cahfp_cli.checkpoint.metadata import (
    CheckpointMetadata,
    InputFile,
    Provenance,
    Record,
    dump_metadata,
    metadata_or_none,
)
from cahfp_cli.checkpoint.safetensors_file import SafetensorsFile, TensorInfo
from cahfp_cli.checkpoint.sharded import ShardedCheckpoint, Tensors, open_checkpoint, write_like
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.checkpoint.writer import TensorSpec, write_safetensors
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.pruning.index_map import without_factors
from cahfp_cli.reconstruction.average import merge_floats, merge_integers
from cahfp_cli.reconstruction.blocks import Block, Holders, Part
from cahfp_cli.reconstruction.clients import Client, Gate, Refusal, read_clients
from cahfp_cli.reconstruction.gate import check_block, mean_of
from cahfp_cli.reconstruction.in_order import in_order
from cahfp_cli.reconstruction.partial import COUNT, VALUE, WEIGHT, PartialMetadata
from cahfp_cli.reconstruction.report import ClientReport, ReconstructionReport, RefusedReport, TensorCoverage
from cahfp_cli.reconstruction.rules import RULES, Floats, Rule, rule_named
from cahfp_cli.reconstruction.statistics import merge_variance
from cahfp_cli.reconstruction.updates import (
    Update,
    agreement,
    brought,
    check_update,
    clipped,
    is_statistic,
    measured,
)

Progress = Callable[[int, int], None]
STACK_BYTES = 32 << 20
"""Of the clients' values that a robust rule looks at together."""


@dataclass(frozen=True)
class Step:
    """How far the server goes: w + rate (merged - w) + momentum (w - w of the round before); running statistics and
    integers are taken as merged. `before`: the global checkpoint of the round before, where there is momentum."""

    rate: float = 1.0
    momentum: float = 0.0
    before: Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 10:
            raise UsageError(f"--server-lr {self.rate}: give a number above 0, at most 10.")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"--server-momentum {self.momentum}: give a number from 0 to below 1.")
        if (self.momentum > 0) != (self.before is not None):
            raise UsageError("--server-momentum needs --before, the global checkpoint of the round before, and back.")


@dataclass(frozen=True)
class Round:
    """All that the blocks of a merge share."""

    checkpoint: Tensors
    clients: tuple[Client, ...]
    rule: Rule
    step: Step
    before: Tensors | None
    threads: int


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
) -> ReconstructionReport:
    """Merge the submodel folders into a copy of the global checkpoint, `output`; with `dry_run` only check everything.

    The order of `submodels` does not matter. The output keeps the metadata of the global checkpoint, with `provenance`
    as its own, completed by the inputs that took part. Factors that compensate a submodel for what was removed are
    taken out of its weights before they are merged, or with `keep_compensation` left in.

    Args: global_checkpoint: a file, or an index of shards or its folder, which makes `output` a folder with the same
        shards. submodels: folders, and partial aggregates. trim: see `rule_named`. weights: by submodel, instead of its
        recorded num_examples. skip_invalid, min_clients, maps, max_examples: see `Gate`. max_update: the norm of a
        client's update, over that of the weights that it was sent, at most. clip: shrink updates to so much, or to the
        median of the clients. partial: write a partial aggregate instead of a checkpoint. audit: measure updates and
        agreement.

    Raises: UsageError: no such rule, a folder listed twice, a weight without a folder, options that do not go together.
        InputError: an input is damaged or does not fit, too few clients are left, or the output exists without `force`;
        nothing is left in its place.
    """
    chosen, step = rule_named(rule, trim), step or Step()
    gate = Gate(skip_invalid, min_clients, maps, *([] if max_examples is None else [max_examples]))
    _check_options(chosen, step, partial, clip, max_update)
    with (
        open_checkpoint(global_checkpoint) as checkpoint,
        nullcontext() if step.before is None else open_checkpoint(step.before) as before,
    ):
        sharded = isinstance(checkpoint, ShardedCheckpoint) and not partial
        (check_folder_target if sharded else check_file_target)(output, force)
        metadata_or_none(checkpoint, CheckpointMetadata)  # another file of ours is refused before it is read
        digest = content_digest(checkpoint, lambda info, block: check_block(checkpoint.path, info, block))
        clients, refused, warnings = read_clients(
            checkpoint, digest, submodels, weights or {}, gate, chosen.by_curvature
        )
        clients = _prepared(clients, chosen, keep_compensation)
        every = audit or clip is not None or max_update is not None
        clients, updates, moved_too_far = _measured(clients, checkpoint, every, max_update, skip_invalid)
        refused = [*refused, *moved_too_far]
        if len(clients) < max(1, gate.min_clients):
            raise InputError(_too_few(len(clients), gate.min_clients, refused))
        if clip is not None:
            clients = clipped(clients, [update for update in updates if update is not None], clip)
        if before is not None:
            _check_same_tensors(before, checkpoint)
        this = Round(checkpoint, tuple(clients), chosen, step, before, threads)
        covered = tuple(_coverage(this, info) for info in checkpoint.tensors.values() if info.dtype in FLOATS)
        made = _completed(provenance, checkpoint, clients, weights or {})
        result = None
        agreements: list[float | None] = [None] * len(clients)
        if not dry_run and partial:
            with atomic_file(output, force) as temporary:
                _write_partial(temporary, this, digest, keep_compensation, made, on_progress)
        elif not dry_run:
            with (atomic_directory if sharded else atomic_file)(output, force) as temporary:
                _write(temporary, this, _metadata(checkpoint, made), on_progress)
                merged = temporary / checkpoint.path.name if sharded else temporary
                result = content_digest(merged)
                if audit:
                    with open_checkpoint(merged) as after:
                        agreements = [agreement(client, checkpoint, after) for client in clients]
    total = sum(sum(tensor.counts) for tensor in covered)
    reports = tuple(
        ClientReport(
            client.path, client.weight, client.members, _entries(client) / max(1, total), client.shrink, update, cosine
        )
        for client, update, cosine in zip(clients, updates, agreements, strict=True)
    )
    return ReconstructionReport(
        output,
        rule,
        keep_compensation,
        reports,
        tuple(RefusedReport(one.path, one.reason) for one in refused),
        sum(client.members for client in clients),
        covered,
        result,
        not dry_run,
        tuple(warnings),
    )


def merged_blocks(info: TensorInfo, this: Round) -> Iterator[Array]:
    """The new rows of one tensor, block by block, in its own dtype.

    Raises: InputError: the result is too large for the dtype.
    """
    holders = Holders(info.name, info.shape, this.clients)

    def merged(rows: tuple[int, int]) -> Array:
        block = Block(info.name, info.shape, *rows)
        if info.dtype not in FLOATS:
            return merge_integers(block, this.checkpoint.read_rows(info.name, *rows), this.clients)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            values = _stepped(block, _merged_floats(block, holders, this), this).astype(DTYPES[info.dtype])
        if not np.isfinite(values).all():
            raise InputError(
                f"{this.checkpoint.path}: the merged tensor {shown(info.name)} has numbers too large for {info.dtype}; "
                "keep the checkpoint in a wider dtype."
            )
        return values

    yield from in_order(merged, row_blocks(info, _block_bytes(info, this)), this.threads)


def _merged_floats(block: Block, holders: Holders, this: Round) -> Floats:
    mean = mean_of(block.name, this.checkpoint.tensors)
    if mean is not None and this.rule.of_sums is not None:
        return merge_variance(block, mean, this.checkpoint, this.clients, holders, this.rule)
    previous = this.checkpoint.read_rows(block.name, block.first, block.last)

    def values(part: Part) -> Array:
        return brought(part, block.name, previous, this.checkpoint.path)

    return merge_floats(block, previous, values, this.clients, holders, this.rule)


def _stepped(block: Block, merged: Floats, this: Round) -> Floats:
    if (this.step.rate == 1 and this.before is None) or is_statistic(block.name):
        return merged
    previous = this.checkpoint.read_rows(block.name, block.first, block.last).astype(np.float64)
    moved = np.where(merged == previous, merged, previous + this.step.rate * (merged - previous))
    if this.before is None:
        return moved
    before = this.before.read_rows(block.name, block.first, block.last).astype(np.float64)
    return np.where(previous == before, moved, moved + this.step.momentum * (previous - before))


def _block_bytes(info: TensorInfo, this: Round) -> int:
    if this.rule.of_values is None:
        return BLOCK_BYTES
    return max(1, min(BLOCK_BYTES, STACK_BYTES * info.itemsize // (8 * len(this.clients))))


# -------------------------------------------------------------------------------------------------- before the merge


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


def _prepared(clients: list[Client], rule: Rule, keep_compensation: bool) -> list[Client]:
    for client in clients:
        if client.partial is None:
            continue
        if rule.of_values is not None:
            raise UsageError(f"{client.path}: the rule {rule.name} needs every client's own values, not an aggregate.")
        if client.partial.keep_compensation != keep_compensation:
            kept = "with" if client.partial.keep_compensation else "without"
            raise UsageError(f"{client.path}: it was aggregated {kept} --keep-compensation; do the same here.")
    if not keep_compensation:
        return clients
    return [replace(client, index_map=without_factors(client.index_map)) for client in clients]


def _measured(
    clients: Sequence[Client], checkpoint: Tensors, every: bool, max_update: float | None, skip_invalid: bool
) -> tuple[list[Client], list[Update | None], list[Refusal]]:
    """The updates of all clients, or only of those that have factors, whose numbers may be too large without them."""
    kept: list[Client] = []
    updates: list[Update | None] = []
    refused = []
    for client in clients:
        update = None
        try:
            if every or any(entry.factors for entry in client.index_map.tensors.values()):
                update = measured(client, checkpoint)
                check_update(client, update, max_update)
        except InputError as error:
            if not skip_invalid:
                raise
            refused.append(Refusal(client.path, " ".join(str(error).split())))
            continue
        kept.append(client)
        updates.append(update if every else None)
    return kept, updates, refused


def _too_few(count: int, least: int, refused: Sequence[Refusal]) -> str:
    message = f"{count} clients passed, and at least {max(1, least)} must."
    return f"{message}\nThe first that did not: {refused[0].reason}" if refused else message


def _check_same_tensors(before: Tensors, checkpoint: Tensors) -> None:
    def form(file: Tensors) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {info.name: (info.dtype, info.shape) for info in file.tensors.values()}

    if form(before) != form(checkpoint):
        raise InputError(f"{before.path}: its tensors are not those of {checkpoint.path}; pass the round before.")
    for info in before.tensors.values():
        for first, last in row_blocks(info):
            check_block(before.path, info, before.read_rows(info.name, first, last))


def _completed(
    provenance: Provenance,
    checkpoint: SafetensorsFile | ShardedCheckpoint,
    clients: Sequence[Client],
    weights: Mapping[Path, float],
) -> Provenance:
    """With the inputs that took part, by their last names and in sorted order, and with their given weights."""
    own = [checkpoint] if isinstance(checkpoint, SafetensorsFile) else checkpoint.shards.values()
    inputs = [InputFile(file=file.path.name, sha256=file_sha256(file.path)) for file in own]
    inputs += [one for client in clients for one in client.inputs]
    took_part = {client.path for client in clients}
    given: list[JsonValue] = [
        [path.resolve().name, weight] for path, weight in sorted(weights.items()) if path in took_part
    ]
    options = {**provenance.options, **({"weights": given} if given else {})}
    ordered = tuple(sorted(inputs, key=lambda one: (one.file, one.sha256)))
    return provenance.model_copy(update={"inputs": ordered, "options": options})


def _metadata(checkpoint: Tensors, provenance: Provenance) -> dict[str, str]:
    """All of the global checkpoint's metadata, with a record that has the new provenance."""
    record = metadata_or_none(checkpoint, CheckpointMetadata) or CheckpointMetadata(provenance=provenance)
    return _with(checkpoint, record.model_copy(update={"provenance": provenance}))


def _with(checkpoint: Tensors, record: Record) -> dict[str, str]:
    return {**dump_metadata(record), **{key: text for key, text in checkpoint.metadata.items() if key != "cahfp"}}


def _coverage(this: Round, info: TensorInfo) -> TensorCoverage:
    holders = Holders(info.name, info.shape, this.clients)
    found = np.zeros(sum(client.members for client in this.clients) + 1, np.int64)
    for first, last in row_blocks(info):
        counts = holders.histogram(Block(info.name, info.shape, first, last))
        found[: len(counts)] += counts
    return TensorCoverage(info.name, tuple(found.tolist()))


def _entries(client: Client) -> int:
    return sum(int(np.prod(info.shape)) for info in client.tensors.tensors.values() if info.dtype in FLOATS)


# ------------------------------------------------------------------------------------------------------------ writing


def _write(target: Path, this: Round, metadata: Mapping[str, str], on_progress: Progress | None) -> None:
    total = sum(info.nbytes for info in this.checkpoint.tensors.values())
    done = 0

    def blocks(tensor: TensorSpec) -> Iterator[Array]:
        nonlocal done
        for block in merged_blocks(this.checkpoint.tensors[tensor.name], this):
            yield block
            done += block.nbytes
            if on_progress is not None:
                on_progress(done, total)

    checkpoint = this.checkpoint
    assert isinstance(checkpoint, SafetensorsFile | ShardedCheckpoint)
    write_like(checkpoint, target, blocks, metadata)


def _write_partial(
    target: Path,
    this: Round,
    digest: str,
    keep_compensation: bool,
    provenance: Provenance,
    on_progress: Progress | None,
) -> None:
    averaged = replace(this, rule=RULES["curvature" if this.rule.by_curvature else "covered"])
    infos = this.checkpoint.tensors
    holders = {name: Holders(name, info.shape, this.clients) for name, info in infos.items()}
    specs, total, done = [], 0, 0
    for info in infos.values():
        floats = info.dtype in FLOATS
        rows = 1 if holders[info.name].same_rows else info.rows
        shape = (rows, *holders[info.name].row_shape) if info.shape else ()
        specs.append(TensorSpec(f"{VALUE}.{info.name}", "F64" if floats else info.dtype, info.shape))
        specs += [TensorSpec(f"{WEIGHT}.{info.name}", "F64", shape), TensorSpec(f"{COUNT}.{info.name}", "I32", shape)]
        total += specs[-3].nbytes + specs[-2].nbytes + specs[-1].nbytes

    def held(kind: str, info: TensorInfo, rows: int) -> Iterator[Array]:
        own = holders[info.name]
        for first, last in [(0, 1)] if rows == 1 else row_blocks(info):
            weight, count = own.of(Block(info.name, info.shape, first, last))
            yield own.spread(weight) if kind == WEIGHT else own.spread(count).astype(np.int32)

    def blocks(spec: TensorSpec) -> Iterator[Array]:
        nonlocal done
        kind, _, name = spec.name.partition(".")
        info = infos[name]
        if kind != VALUE:
            made = held(kind, info, spec.shape[0] if spec.shape else 1)
        elif info.dtype in FLOATS:
            made = wide_blocks(info, averaged)
        else:
            made = merged_blocks(info, averaged)
        for block in made:
            yield block
            done += block.nbytes
            if on_progress is not None:
                on_progress(done, total)

    record = PartialMetadata(
        checkpoint=digest,
        clients=sum(client.members for client in this.clients),
        weight=float(sum(client.weight for client in this.clients)),
        keep_compensation=keep_compensation,
        provenance=provenance,
    )
    write_safetensors(target, specs, blocks, dump_metadata(record))


def wide_blocks(info: TensorInfo, this: Round) -> Iterator[Array]:
    """As `merged_blocks` of a float tensor, in float64."""
    holders = Holders(info.name, info.shape, this.clients)

    def merged(rows: tuple[int, int]) -> Array:
        return np.ascontiguousarray(_merged_floats(Block(info.name, info.shape, *rows), holders, this))

    yield from in_order(merged, row_blocks(info), this.threads)
