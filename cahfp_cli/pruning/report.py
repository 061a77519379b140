"""`report.json` of a submodel folder: what was predicted, measured and promised."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cahfp_cli.checkpoint import strict_json
from cahfp_cli.errors import InputError

FORMAT = "cahfp.report/1"
MAX_BYTES = 16 * 2**20


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write exactly `path`; equal reports give equal bytes. Raises ValueError for NaN or infinite numbers."""
    text = json.dumps({**report, "format": FORMAT}, indent=2, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_report(path: Path) -> dict[str, Any]:
    """Read a report. Raises: InputError: it is not one of ours, or damaged."""
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: too large for a report; make the submodel again.")
    try:
        report = strict_json.parse(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}. Make the submodel again.") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise InputError(f"{path}: not a report of cahfp ({FORMAT}).")
    return report
