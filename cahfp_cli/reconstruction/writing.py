"""Write what a round comes to: the new global checkpoint, or a partial aggregate."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from cahfp_cli.checkpoint.digest import row_blocks
from cahfp_cli.checkpoint.dtypes import FLOATS, Array
from cahfp_cli.checkpoint.metadata import KEY, CheckpointMetadata, Provenance, dump_metadata, metadata_or_none
from cahfp_cli.checkpoint.safetensors_file import MAX_NAME_LENGTH, TensorInfo
from cahfp_cli.checkpoint.sharded import write_like
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.checkpoint.writer import TensorSpec, write_safetensors
from cahfp_cli.errors import InputError
from cahfp_cli.reconstruction.blocks import Block, Holders
from cahfp_cli.reconstruction.partial import COUNT, MOST_CLIENTS, RECORD_BYTES, VALUE, WEIGHT, PartialMetadata
from cahfp_cli.reconstruction.round import Round, merged_blocks, wide_blocks
from cahfp_cli.reconstruction.rules import RULES

Progress = Callable[[int, int], None]


def write_checkpoint(target: Path, this: Round, provenance: Provenance, on_progress: Progress | None) -> None:
    """Write the new global checkpoint to exactly `target`, with all metadata of the old one and a new provenance."""
    record = metadata_or_none(this.checkpoint, CheckpointMetadata) or CheckpointMetadata(provenance=provenance)
    renewed = dump_metadata(record.model_copy(update={"provenance": provenance}))
    metadata = {**renewed, **{key: text for key, text in this.checkpoint.metadata.items() if key != "cahfp"}}
    total = sum(info.nbytes for info in this.checkpoint.tensors.values())
    done = 0

    def blocks(tensor: TensorSpec) -> Iterator[Array]:
        nonlocal done
        for block in merged_blocks(this.checkpoint.tensors[tensor.name], this):
            yield block
            done += block.nbytes
            if on_progress is not None:
                on_progress(done, total)

    write_like(this.checkpoint, target, blocks, metadata)


def write_partial(
    target: Path,
    this: Round,
    digest: str,
    keep_compensation: bool,
    provenance: Provenance,
    on_progress: Progress | None,
) -> None:
    """Write the partial aggregate of the round's clients to exactly `target`.

    Raises: InputError: it would be larger than what `read_partial` takes.
    """
    members = sum(client.members for client in this.clients)
    if members > MOST_CLIENTS:
        raise InputError(f"{members} clients are too many for one aggregate, which has at most {MOST_CLIENTS}.")
    longest = max(this.checkpoint.tensors, key=len, default="")
    if len(longest) > MAX_NAME_LENGTH - len(f"{WEIGHT}."):
        raise InputError(
            f"the name of tensor {shown(longest)} is too long for an aggregate; merge the clients at once."
        )
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
        clients=members,
        weight=float(sum(client.weight for client in this.clients)),
        keep_compensation=keep_compensation,
        by_curvature=any(
            client.curvature is not None or (client.partial is not None and client.partial.by_curvature)
            for client in this.clients
        ),
        provenance=provenance,
    )
    metadata = dump_metadata(record)
    size = len(json.dumps(metadata[KEY]))  # as it stands in the header
    if size > RECORD_BYTES:
        raise InputError(
            f"the names of the files of {len(this.clients)} clients take {size} bytes, and an aggregate may have "
            f"{RECORD_BYTES}; aggregate fewer clients at a time, or give their folders shorter names."
        )
    write_safetensors(target, specs, blocks, metadata)
