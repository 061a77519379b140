"""The command line in this process: as the installed command, without the seconds in which Python and torch start."""

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from typing import Any

from cahfp_cli.app import main


@dataclass(frozen=True)
class Said:
    """A command's exit code and what it printed."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    @property
    def error(self) -> str:
        """What it printed but for warnings, on one line."""
        lines = [line.strip() for line in self.stderr.splitlines() if not line.startswith("warning:")]
        return " ".join(line for line in lines if line).removeprefix("error: ")


def cahfp(*arguments: object) -> Said:
    """Run `cahfp ARGUMENTS`."""
    said, warned, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["cahfp", *map(str, arguments)]
    code: object = 0
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(warned):
            main()
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = before
    return Said(code if isinstance(code, int) else 0, said.getvalue(), warned.getvalue())
