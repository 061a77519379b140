"""The documentation: links lead somewhere, commands in it exist, the tutorial runs, pictures are current."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main

from cahfp_cli.app import app
from tests.support.commands import run_here

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").glob("*.md")])
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", flags=re.M | re.S)
HEADING = re.compile(r"^#+ +(.+?) *$", flags=re.M)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
PUNCTUATION = set("();<>|&")
TUTORIAL = ROOT / "docs" / "tutorial" / "two-boards.md"


def named(pages: list[Path]) -> list[Any]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


def prose(page: Path) -> str:
    """What is neither in a block nor in a span of code, with headings as they are."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub and the site make them; a heading that is there twice gets a number."""
    found: dict[str, int] = {}
    for heading in HEADING.findall(prose(page)):
        plain = LINK.sub(lambda link: link[0][1 : link[0].index("](")], heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if not number else f"{slug}-{number}" for slug, last in found.items() for number in range(last + 1)}


@pytest.mark.parametrize("page", named(PAGES))
def test_every_relative_link_leads_to_a_file_and_a_heading_of_it(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    broken = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_every_page_is_linked_from_the_first_one_of_docs_or_from_the_results() -> None:
    docs = ROOT / "docs"
    linked = {docs / "README.md"}
    for index in (docs / "README.md", docs / "results" / "README.md"):
        linked |= {(index.parent / target.partition("#")[0]).resolve() for target in LINK.findall(prose(index))}
    assert not sorted(str(page.relative_to(ROOT)) for page in docs.rglob("*.md") if page not in linked)


def blocks(page: Path, *languages: str) -> Iterator[str]:
    return (block[3] for block in FENCE.finditer(page.read_text(encoding="utf-8")) if block[1] in languages)


def commands(page: Path) -> list[tuple[str, ...]]:
    """The words of every command in the page's blocks for a shell, up to a redirection or another command.

    Here documents are left out, and what only says how a command is used: `cahfp COMMAND [OPTIONS] ...`.
    """
    found = []
    for block in blocks(page, "sh", "bash", "console"):
        text = re.sub(r"<<'(\w+)'\n.*?^\1$", "\n", block, flags=re.M | re.S).replace("\\\n", " ")
        for line in text.splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            if "[OPTIONS]" in line:
                continue
            words: list[str] = []
            for word in [*lexer, ";"]:
                if not set(word) <= PUNCTUATION:
                    words.append(word)
                elif words:
                    found.append(tuple(words))
                    words = []
    return found


def parse(words: tuple[str, ...]) -> None:
    """Parse a command by the app's own declarations, without running it. Raises what a slip raises."""
    group: Any = typer.main.get_command(app)
    context, rest = group.make_context("cahfp", list(words), resilient_parsing=False), None
    while hasattr(context.command, "commands"):
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, rest = context.command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    assert not context.args


WITH_COMMANDS = [page for page in PAGES if any(words[0] == "cahfp" for words in commands(page))]


@pytest.mark.parametrize("page", named(WITH_COMMANDS))
def test_every_command_of_a_page_parses(page: Path) -> None:
    for words in commands(page):
        if words[0] == "cahfp":
            try:
                parse(words[1:])
            except Exception as error:
                pytest.fail(f"{shlex.join(words)}: {getattr(error, 'message', error)!r}")


@pytest.mark.parametrize("slip", ["prune g --keep 0.5 --bogus -o x", "nonsense", "prune g -o", "profile nonsense"])
def test_a_command_with_a_slip_does_not_parse(slip: str) -> None:
    with pytest.raises(Exception, match=r"(?i)bogus|nonsense|requires an argument"):
        parse(tuple(slip.split()))


def test_commands_of_blocks_are_found_behind_comments_loops_and_redirections(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\n# cahfp no\nfor a in b; do\n  cahfp x \\\n  'y z' > f || {\n  exit 1; }\ndone\n```\n")
    assert [words for words in commands(page) if words[0] == "cahfp"] == [("cahfp", "x", "y z")]


@pytest.mark.parametrize("page", named(PAGES))
def test_every_script_that_a_block_runs_exists(page: Path) -> None:
    for words in commands(page):
        for word in words[:2]:
            assert not word.startswith("scripts/") or (ROOT / word).is_file(), word


def test_the_tutorial_runs_as_it_stands_and_merging_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [block for block in FENCE.finditer(TUTORIAL.read_text()) if 'title="' in block[2]]
    monkeypatch.chdir(tmp_path)
    for block in files:
        Path(block[2].split('"')[1]).write_text(block[3])
    said = []
    for words in commands(TUTORIAL):
        if words[0] == "python":
            subprocess.run([sys.executable, *words[1:]], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            continue
        assert words[0] == "cahfp"
        said.append((words[1], run_here(*words[1:])))
        assert said[-1][1].code == 0, said[-1][1].stderr
    assert [name for name, _ in said] == [
        *("train", "inspect", "prune", "prune", "train", "train", "reconstruct", "evaluate")
    ]
    before, after = (
        float(re.search(r"accuracy\D*([\d.]+)%", said[place][1].stdout)[1])  # type: ignore[index]
        for place in (0, -1)
    )
    assert after > before > 75


def test_the_picture_is_what_its_script_draws(tmp_path: Path) -> None:
    drawn = tmp_path / "overview.svg"
    subprocess.run([sys.executable, ROOT / "scripts" / "overview.py", "-o", drawn], check=True)
    assert drawn.read_bytes() == (ROOT / "docs" / "overview.svg").read_bytes()
