"""What in a folder is ours, and so may be replaced: a file is if it says so by its `format`."""

from collections.abc import Callable, Mapping
from pathlib import Path

from cahfp_cli.checkpoint import strict_json
from cahfp_cli.checkpoint.metadata import KEY, CheckpointMetadata, Record
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.sharded import SUFFIX, files_of, open_checkpoint
from cahfp_cli.errors import InputError

Foreign = Callable[[Path], str | None]
"""The name of the first entry of a folder that is not part of the output in question; None if all of them are."""


def format_of(metadata: Mapping[str, str]) -> str | None:
    """The `format` that the metadata of a safetensors file names, None where it names none that can be read."""
    try:
        record = strict_json.parse(metadata[KEY])
    except (KeyError, ValueError):
        return None
    found = record.get("format") if isinstance(record, dict) else None
    return found if isinstance(found, str) else None


def format_of_file(path: Path) -> str | None:
    """As `format_of`, of a file that may be anything."""
    try:
        with open_safetensors(path) as file:
            return format_of(file.metadata)
    except (InputError, OSError):
        return None


def format_named_by(schema: type[Record]) -> str:
    """The `format` of files whose metadata are of this schema."""
    return str(schema.model_fields["format"].default)


def foreign_in_shards(folder: Path) -> str | None:
    """See `Foreign`; the output is a checkpoint in shards, the first of which says whose it is."""
    found = sorted(path.name for path in folder.iterdir())
    indices = [name for name in found if name.endswith(SUFFIX)]
    if len(indices) != 1:
        return found[0] if found else None
    try:
        with open_checkpoint(folder / indices[0]) as checkpoint:
            own, shards = format_of(checkpoint.metadata), {path.name for path in files_of(checkpoint)}
    except (InputError, OSError):
        return indices[0]
    if own != format_named_by(CheckpointMetadata):
        return indices[0]
    return next((name for name in found if name not in shards), None)
