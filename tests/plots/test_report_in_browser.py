"""The report of a simulation in a real browser: everything is in the one file, and is shown."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from tests.support.commands import run_well
from tests.support.experiments import TOML, write_toml

CHROMIUM = shutil.which("chromium")
LOOK = """<script>addEventListener("load", () => {
  const images = [...document.images];
  const found = {
    broken: images.filter(one => !(one.complete && one.naturalWidth > 100 && one.getBoundingClientRect().height > 50))
      .map(one => one.alt),
    images: images.map(one => one.alt),
    tables: [...document.querySelectorAll("h2 + table")].map(one => [
      one.previousElementSibling.textContent,
      one.tHead.rows[0].cells.length,
      ...[...one.tBodies[0].rows].map(row => row.innerText.split("\\t").filter(cell => cell.trim()).length)]),
    listings: [...document.querySelectorAll("pre")].map(one => one.innerText.length),
    wide: document.documentElement.scrollWidth > innerWidth,
    loaded: performance.getEntriesByType("resource").map(one => one.name.slice(0, 40))
      .filter(name => !name.startsWith("data:")),
  };
  document.body.innerHTML = "";
  document.body.setAttribute("data-found", JSON.stringify(found));
})</script>"""
"""Added to a copy of the report, which has no scripts of its own."""


def opened(page: Path, profile: Path) -> tuple[str, str]:
    """The document as it is after loading, and what the browser says, its console included."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]
    command += ["--window-size=1280,900", "--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
def test_every_figure_and_table_of_the_report_is_shown_and_the_console_is_silent(tmp_path: Path) -> None:
    toml, output = write_toml(tmp_path / "e.toml", f"{TOML}\n[evaluation]\nbound_terms = true\n"), tmp_path / "out"
    run_well("simulate", toml, "-o", output, "--threads", "1")
    report = (output / "report.html").read_text()
    (tmp_path / "alone").mkdir()
    page = tmp_path / "alone" / "page.html"
    page.write_text(report.replace("</body>", f"{LOOK}</body>"))
    document, said = opened(page, tmp_path / "profile")
    assert "CONSOLE" not in said, said
    holder = re.search(r'data-found="([^"]*)"', document)
    assert holder, document[:2000]
    found = json.loads(unescape(holder[1]))
    assert not found["broken"] and not found["loaded"] and not found["wide"]
    assert len(found["images"]) == len(list(output.glob("*.png"))) == 9
    assert len(set(found["images"])) == 9
    partition, devices = found["tables"]
    assert partition == ["dirichlet(0.5)", 8, 8, 8]
    assert devices[0].startswith("dirichlet(0.5): accuracy of each device") and devices[1:] == [5, 5, 5]
    assert found["listings"] and min(found["listings"]) > 100


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
def test_what_is_broken_in_a_page_is_noticed(tmp_path: Path) -> None:
    """The look itself: a damaged figure, a figure outside the file, an error in the console."""
    body = '<img alt="damaged" src="data:image/svg+xml;base64,AAAA"><img alt="outside" src="http://localhost/x.png">'
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><body>{body}<script>missing()</script>{LOOK}</body>")
    document, said = opened(page, tmp_path / "profile")
    holder = re.search(r'data-found="([^"]*)"', document)
    assert holder and json.loads(unescape(holder[1]))["broken"] == ["damaged", "outside"]
    assert "CONSOLE" in said
