"""A page about one reconstruction: who took part, and how much of each tensor how many clients hold."""

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cahfp_cli.reconstruction.report import ClientReport, ReconstructionReport, TensorCoverage

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .2rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr:nth-child(even) { background: #f5f5f5 }
.bar { display: flex; width: 22rem; height: 1rem; background: #eee } .refused { color: #a00 }
code { font-size: 90% }
"""
LIGHTEST, DARKEST = 88, 30
"""Per cent of lightness: entries that one client holds, and that all hold. Those that none holds are red."""


def coverage_page(report: "ReconstructionReport") -> str:
    """One self-contained HTML file, without scripts."""
    clients = "".join(map(_client, report.clients))
    refused = "".join(
        f'<tr class="refused"><td><code>{escape(str(one.path))}</code></td>'
        f'<td colspan="5">{escape(one.reason)}</td></tr>'
        for one in report.refused
    )
    tensors = "".join(_tensor(tensor, report.members) for tensor in report.tensors)
    covered = report.coverage
    total = max(1, covered.none + covered.some + covered.all)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Reconstruction</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>Reconstruction</h1>\n"
        f"<p>Rule <b>{escape(report.rule)}</b>, {report.members} clients. Of all entries {covered.all / total:.1%} are "
        f"held by all clients, {covered.some / total:.1%} by some, {covered.none / total:.1%} by none.</p>\n"
        "<h2>Clients</h2>\n<table><tr><th>client</th><th>examples</th><th>kept</th><th>update / norm</th>"
        f"<th>clipped to</th><th>agreement</th></tr>\n{clients}{refused}</table>\n"
        "<h2>Entries by holders</h2>\n<p>From left to right: held by no client (red), by one (light) to all (dark).</p>"
        f"\n<table><tr><th>tensor</th><th>entries</th><th>by none</th><th>by all</th><th></th></tr>\n{tensors}</table>"
        "\n</body></html>\n"
    )


def _client(client: "ClientReport") -> str:
    update = "" if client.update is None else f"{client.update.weights.ratio:.3g}"
    cosine = "" if client.agreement is None else f"{client.agreement:+.2f}"
    shrink = "" if client.shrink[0] == 1 else f"{client.shrink[0]:.1%}"
    return (
        f"<tr><td><code>{escape(str(client.path))}</code></td><td>{client.num_examples:g}</td>"
        f"<td>{client.kept:.1%}</td><td>{update}</td><td>{shrink}</td><td>{cosine}</td></tr>\n"
    )


def _tensor(tensor: "TensorCoverage", members: int) -> str:
    total = max(1, sum(tensor.counts))
    bars = "".join(
        f'<span style="width:{count / total:.3%};background:{_colour(number, members)}" '
        f'title="{number}: {count / total:.1%}"></span>'
        for number, count in enumerate(tensor.counts)
        if count
    )
    return (
        f"<tr><td><code>{escape(tensor.name)}</code></td><td>{total:,}</td><td>{tensor.counts[0] / total:.1%}</td>"
        f'<td>{tensor.counts[-1] / total:.1%}</td><td><div class="bar">{bars}</div></td></tr>\n'
    )


def _colour(number: int, members: int) -> str:
    if number == 0:
        return "#c33"
    share = (number - 1) / max(1, members - 1)
    return f"hsl(210 60% {LIGHTEST + share * (DARKEST - LIGHTEST):.0f}%)"
