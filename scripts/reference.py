#!/usr/bin/env python3
"""Write docs/reference/cli.md, every command and option of `cahfp`, from the program itself.

    python scripts/reference.py

tests/test_reference.py fails where the page is older than the program; run this and commit the page.
"""

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from cahfp_cli.app import app
from cahfp_cli.commands.guides import EXIT_CODES, GUIDES, VARIABLES, Guide
from cahfp_cli.commands.helping import Entry, entries

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "cli.md"
HEAD = """# Commands

Every command and option, as `cahfp COMMAND --help` has them. Made by `scripts/reference.py`: do not edit it.

Results go to standard output, everything else to standard error. Quantities are written as `5ms`, `64MB` (10^6 bytes),
`2MiB` (2^20 bytes), `30M`; shares as `0.5` or `50%`.
"""


def page() -> str:
    """The page's text."""
    root = context_of(None, "cahfp", typer.main.get_command(app))
    parts = [HEAD, section("cahfp", root, None)]
    parts += [section(f"cahfp {name}", context, GUIDES.get(name)) for name, context in commands_of(root)]
    listed = "\n".join(f"- `{code}`: {meaning}" for code, meaning in EXIT_CODES.items())
    variables = "\n".join(f"- `{name}`: {meaning}" for name, meaning in VARIABLES.items())
    parts.append(f"## Exit codes\n\n{listed}\n")
    parts.append(
        f"## Environment variables\n\n{variables}\n\n"
        "PyTorch and ONNX Runtime read their own, such as `OMP_NUM_THREADS`; `--threads` takes precedence.\n"
    )
    return "\n".join(parts)


def context_of(parent: Any, name: str, command: Any) -> Any:
    return command.make_context(name, [], parent=parent, resilient_parsing=True)


def commands_of(context: Any) -> Iterator[tuple[str, Any]]:
    """Each command under a group with its name, such as `profile show`, and its context."""
    for name, command in context.command.commands.items():
        own = context_of(context, name, command)
        if hasattr(command, "commands"):
            yield from ((f"{name} {inner}", its) for inner, its in commands_of(own))
        else:
            yield name, own


def section(name: str, context: Any, guide: Guide | None) -> str:
    """One command: what it does, how it is called, its options in their groups, examples and where to read on."""
    command = context.command
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    parts = [f"## {name}\n\n{command.help}\n\n```sh\n{usage}\n```\n"]
    for panel, found in groupby(entries(command.get_params(context)), key=lambda entry: entry.panel):
        parts.append(f"**{panel}**\n\n" + "".join(map(line, found)))
    if guide is not None:
        examples = "\n".join(guide.examples)
        parts.append(f"**Examples**\n\n```sh\n{examples}\n```\n\nLearn more: {link(guide.page)}\n")
    return "\n".join(parts)


def line(entry: Entry) -> str:
    notes = f" ({'; '.join(entry.notes)})" if entry.notes else ""
    return f"- `{entry.names}`{notes}: {entry.help}\n"


def link(page: str) -> str:
    return f"[{page}]({os.path.relpath(page, 'docs/reference')})" if page.startswith("docs/") else page


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
