"""docs/reference/cli.md is what the program says of itself."""

import re
import runpy
from pathlib import Path

from cahfp_cli.commands.guides import VARIABLES

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "reference.py"


def test_the_page_of_commands_is_what_the_program_says_of_itself() -> None:
    made = runpy.run_path(str(SCRIPT))["page"]()
    kept = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert made == kept, "docs/reference/cli.md is out of date: run `python scripts/reference.py` and commit the page"


def test_the_page_tells_of_every_variable_that_the_code_reads() -> None:
    read = {
        name
        for path in (ROOT / "cahfp_cli").rglob("*.py")
        for name in re.findall(r"environ\S*?[\"'](CAHFP_\w+)", path.read_text())
    }
    assert read and read <= set(VARIABLES)
