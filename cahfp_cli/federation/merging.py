"""Replies are merged in memory, by the gate and the code that `cahfp reconstruct` runs on folders, to the same bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cahfp_cli.checkpoint.dtypes import DTYPES, FLOATS, Array
from cahfp_cli.checkpoint.in_memory import TensorsInMemory
from cahfp_cli.checkpoint.metadata import CheckpointMetadata, SubmodelMetadata, dump_metadata
from cahfp_cli.formats.index_map import IndexMap
from cahfp_cli.reconstruction.blocks import Holders
from cahfp_cli.reconstruction.clients import Client, client_in_memory, in_merging_order, map_key
from cahfp_cli.reconstruction.merge import coverage_of
from cahfp_cli.reconstruction.report import TensorCoverage
from cahfp_cli.reconstruction.round import Round, Step, merged_blocks
from cahfp_cli.reconstruction.rules import rule_named

GLOBAL = Path("the global checkpoint")


@dataclass(frozen=True)
class Merger:
    """The server's side of a merge: the global tensors, and what the checkpoint says of itself (it names its model,
    input shape and classes)."""

    checkpoint: TensorsInMemory
    about: CheckpointMetadata

    @staticmethod
    def of(arrays: Mapping[str, Array], about: CheckpointMetadata) -> "Merger":
        return Merger(TensorsInMemory(GLOBAL, arrays, {}), about)

    def admitted(self, client: int, arrays: Mapping[str, Array], num_examples: int, index_map: IndexMap) -> Client:
        """A reply as one that is merged.

        Args: arrays: of the names, shapes and dtypes of `index_map`, by which the server cut what it sent.
        Raises: InputError: numbers in it do not pass the gate of `reconstruct`.
        """
        about = self.about
        assert about.model is not None and about.input_shape is not None and about.classes is not None
        metadata = SubmodelMetadata(
            model=about.model,
            input_shape=about.input_shape,
            input_dtype=about.input_dtype or "float32",
            classes=about.classes,
            checkpoint=index_map.checkpoint,
            num_examples=int(num_examples),
            provenance=about.provenance,
        )
        tensors = TensorsInMemory(Path(f"client-{client}"), arrays, dump_metadata(metadata))
        return client_in_memory(self.checkpoint, tensors, index_map, map_key(index_map), num_examples)

    def record(self, clients: Sequence[Client]) -> CheckpointMetadata:
        """What the merged checkpoint says of itself: each reply goes by the sha256 that it has as a file."""
        inputs = [one for client in clients for one in client.inputs]
        ordered = tuple(sorted(inputs, key=lambda one: (one.file, one.sha256)))
        provenance = self.about.provenance.model_copy(update={"inputs": ordered})
        return self.about.model_copy(update={"provenance": provenance})

    def merged(self, clients: Sequence[Client], rule: str) -> "Merged":
        """Raises: InputError: the merged numbers overflow."""
        this = Round(self.checkpoint, tuple(in_merging_order(clients)), rule_named(rule), Step(), None, threads=1)
        arrays, coverage = {}, []
        for name, info in self.checkpoint.tensors.items():
            holders = Holders(name, info.shape, this.clients)
            nothing = np.empty(0, DTYPES[info.dtype])  # all there is of an empty tensor
            blocks = [block.reshape(-1) for block in merged_blocks(info, this, holders)]
            arrays[name] = np.concatenate([nothing, *blocks]).reshape(info.shape)
            if info.dtype in FLOATS and len(info.shape) > 1:
                coverage.append(coverage_of(info, holders, len(clients)))
        return Merged(arrays, tuple(coverage))


@dataclass(frozen=True)
class Merged:
    """The new global tensors, and how many entries of each weight (of two axes or more) how many clients hold."""

    arrays: Mapping[str, Array]
    coverage: tuple[TensorCoverage, ...]
