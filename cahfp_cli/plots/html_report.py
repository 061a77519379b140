"""A report as one HTML file that needs nothing else: tables, and figures as inline SVG images."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO

from matplotlib.figure import Figure

from cahfp_cli.plots.figure_file import METADATA, plain_style

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}"
    "td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%;height:auto}"
    "pre{background:#f6f6f6;padding:1rem;overflow:auto;font-size:13px}"
)


@dataclass(frozen=True)
class Table:
    """A heading, and rows under named columns; every cell is text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure with its caption."""

    caption: str
    figure: Figure


@dataclass(frozen=True)
class Listing:
    """Preformatted text under a heading."""

    title: str
    text: str


def html_report(title: str, introduction: str, parts: Sequence[Table | Picture | Listing]) -> str:
    """The whole document; equal parts give equal text."""
    body = "\n".join(_html(part) for part in parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n<p>{escape(introduction)}</p>\n{body}\n</body></html>\n"
    )


def _html(part: Table | Picture | Listing) -> str:
    if isinstance(part, Table):
        head = "".join(f"<th>{escape(column)}</th>" for column in part.columns)
        rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in part.rows)
        return f"<h2>{escape(part.title)}</h2>\n<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>"
    if isinstance(part, Listing):
        return f"<h2>{escape(part.title)}</h2>\n<pre>{escape(part.text)}</pre>"
    image = base64.b64encode(_svg(part.figure)).decode()
    caption = escape(part.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/svg+xml;base64,{image}"><figcaption>{caption}</figcaption>'
        "</figure>"
    )


@plain_style()
def _svg(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata=METADATA[".svg"])
    return buffer.getvalue()
