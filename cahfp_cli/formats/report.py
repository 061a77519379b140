"""`report.json` of a submodel folder: what was predicted, measured and promised."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cahfp_cli.checkpoint import strict_json
from cahfp_cli.checkpoint.sharded import Tensors
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.errors import InputError

FORMAT = "cahfp.report/1"
MAX_BYTES = 2**27
"""Of any report; ten million groups that were kept have less."""
ROOM_BYTES, GROUP_BYTES, AXIS_BYTES = 2**20, 16, 512


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write exactly `path`; equal reports give equal bytes. Raises ValueError for NaN or infinite numbers."""
    text = json.dumps({**report, "format": FORMAT}, indent=2, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def most_bytes(checkpoint: Tensors) -> int:
    """More bytes than a report on a submodel of `checkpoint` has: a line for each group that is kept, with an index
    of an axis; a few for each family of groups; and room for the rest."""
    lines = sum(
        GROUP_BYTES * sum(info.shape) + (AXIS_BYTES + 12 * len(info.name)) * len(info.shape)
        for info in checkpoint.tensors.values()
    )
    return min(MAX_BYTES, ROOM_BYTES + lines)


def read_report(path: Path) -> dict[str, Any]:
    """Read a report. Raises: InputError: it is missing, not one of ours, or damaged."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such file.")
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise InputError(f"{path}: too large for a report; make the submodel again.")
    try:
        report = strict_json.parse(text)
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}. Make the submodel again.") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise InputError(f"{path}: not a report of cahfp ({FORMAT}).")
    return report


def kept_groups(path: Path, report: Mapping[str, Any], groups: int) -> list[int]:
    """The numbers of the groups that a submodel kept, of `groups` of its network; `report` was read from `path`.

    Raises: InputError: the report lacks them, or they are not strictly increasing numbers below `groups`.
    """
    kept = report.get("kept_groups")
    if not isinstance(kept, list):
        raise InputError(f"{path}: it has no list 'kept_groups', so it does not say what was cut; prune again.")
    last = -1
    for number in kept:
        if type(number) is not int or not last < number < groups:
            raise InputError(
                f"{path}: 'kept_groups' must hold increasing numbers from 0 to {groups - 1}, each once, but "
                f"holds {shown(str(number))}. The report is damaged or of another network: prune again."
            )
        last = number
    return kept
