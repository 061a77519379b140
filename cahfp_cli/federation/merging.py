"""Replies become submodel folders, and `reconstruct` merges them: the code that `cahfp reconstruct` runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.checkpoint.metadata import CheckpointMetadata, SubmodelMetadata, dump_metadata
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.pruning.files import INDEX_MAP, TENSORS
from cahfp_cli.pruning.index_map import IndexMap, write_index_map
from cahfp_cli.reconstruction.merge import reconstruct

REPLIES = ".replies-"
"""How the names of folders begin that hold replies while they are merged."""


@dataclass(frozen=True)
class Contribution:
    """A client's sound reply, with the index map that the server cut its submodel by."""

    client: int
    arrays: Mapping[str, Array]
    num_examples: int
    index_map: IndexMap


def merge(
    checkpoint: Path, about: CheckpointMetadata, contributions: Sequence[Contribution], output: Path, rule: str
) -> None:
    """Merge into a new checkpoint `output`, which is replaced if it exists; folders of the clients lie beside it
    meanwhile.

    Args: about: what `checkpoint` says of itself; it names its model, input shape and classes.
    Raises: InputError: the merged numbers overflow.
    """
    assert about.model is not None and about.input_shape is not None and about.classes is not None
    with TemporaryDirectory(prefix=REPLIES, dir=output.parent) as temporary:
        folders = []
        for one in contributions:
            folder = Path(temporary, f"client-{one.client}")
            folder.mkdir()
            metadata = SubmodelMetadata(
                model=about.model,
                input_shape=about.input_shape,
                classes=about.classes,
                checkpoint=one.index_map.checkpoint,
                num_examples=int(one.num_examples),
                provenance=about.provenance,
            )
            save_arrays(folder / TENSORS, one.arrays, dump_metadata(metadata))
            write_index_map(folder / INDEX_MAP, one.index_map, about.provenance)
            folders.append(folder)
        reconstruct(checkpoint, folders, output, rule=rule, force=True, provenance=about.provenance)
