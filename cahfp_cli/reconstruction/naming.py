"""The global checkpoint by the names that its submodels have, where it is someone else's.

`cahfp prune` takes checkpoints whose names are those of a wrapper, or that lack counters, and reads them as the network
itself would have saved them (see checkpoint/fitting.py). Here no network is at hand, but every index map names its
tensors, and the digest in it tells whether they are the right ones.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from cahfp_cli.checkpoint.digest import content_digest
from cahfp_cli.checkpoint.fitting import fit
from cahfp_cli.checkpoint.metadata import KEY, read_metadata
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.sharded import Tensors
from cahfp_cli.errors import InputError
from cahfp_cli.formats.index_map_file import read_index_map
from cahfp_cli.reconstruction.gate import map_of
from cahfp_cli.reconstruction.partial import VALUE, PartialMetadata, most_header


def as_pruned(checkpoint: Tensors, submodels: Sequence[Path], maps: Path | None) -> Tensors:
    """The checkpoint by the names of the first submodel that was made of it under other names; itself if there is none.

    Args: submodels: folders and partial aggregates, none of which has been checked. maps: see `Gate`.
    """
    if KEY in checkpoint.metadata:
        return checkpoint
    tried = {frozenset(checkpoint.tensors)}
    for names, digest in _claims(checkpoint, submodels, maps):
        if names not in tried:
            tried.add(names)
            fitted = fit(checkpoint, names)
            if content_digest(fitted) == digest:
                return fitted
    return checkpoint


def _claims(checkpoint: Tensors, submodels: Sequence[Path], maps: Path | None) -> Iterator[tuple[frozenset[str], str]]:
    """Names of tensors, and the content digest of the checkpoint that they are said to be of; what cannot be read is
    left to the gate."""
    for path in submodels:
        try:
            if path.is_file():
                with open_safetensors(path, None, most_header(checkpoint)) as file:
                    values = (name.partition(".") for name in file.tensors)
                    names = frozenset(name for kind, _, name in values if kind == VALUE)
                    yield names, read_metadata(file, PartialMetadata).checkpoint
            else:
                index_map = read_index_map(map_of(path, maps), checkpoint)
                yield frozenset(index_map.tensors), index_map.checkpoint
        except InputError:
            continue
