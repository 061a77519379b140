"""How an output came to be: tool, command, options, and the sha256 of each input."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from cahfp_cli import __version__
from cahfp_cli.checkpoint.digest import file_sha256
from cahfp_cli.checkpoint.metadata import InputFile, Provenance

SUBMODEL_FILES = ("submodel.safetensors", "index_map.safetensors")


def provenance(command: str, options: Mapping[str, JsonValue], inputs: Sequence[Path]) -> Provenance:
    """Record a command. Inputs go by their last name and in sorted order, so neither the folder nor the order in
    which they were listed changes the output. Of a submodel folder NAME, the record has `NAME/submodel.safetensors`
    and `NAME/index_map.safetensors`, those that exist.

    Raises: InputError: an input cannot be read.
    """
    files = [InputFile(file=name, sha256=file_sha256(path)) for name, path in _files(inputs)]
    return Provenance(
        tool=f"cahfp {__version__}",
        command=command,
        options=dict(options),
        inputs=tuple(sorted(files, key=lambda file: (file.file, file.sha256))),
    )


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were set."""
    return {name: value for name, value in options.items() if value not in (None, False, [])}


def portable(spec: str) -> str:
    """A data or model spec as it is recorded: an absolute path by its last name, as it says nothing elsewhere.

    >>> portable("npz:/home/me/share.npz@train[0:100]")
    'npz:share.npz@train[0:100]'
    """
    return re.sub(r"(^|:)/(?:[^:]*/)?", r"\1", spec.rstrip("/"))


def _files(inputs: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    for path in inputs:
        if not path.is_dir():
            yield path.name, path
            continue
        for name in SUBMODEL_FILES:
            if (path / name).exists():
                yield f"{path.resolve().name}/{name}", path / name
