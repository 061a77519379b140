"""Draws the picture at the top of README: one network, a submodel for each board, one network again.

    python scripts/overview.py [-o docs/overview.svg]

Plain SVG, the same bytes each time; a test holds the committed file to it.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT = 860, 300
LAYERS = (8, 12, 12, 6)
"""Channels of each layer of the network in the picture."""
CELL, GAP, STEP = 9, 3, 26
INK, LOST, MOVED, TRAINED = "#24303c", "#d9dee3", "#2a6fb0", "#d9822b"


@dataclass(frozen=True)
class Board:
    """A device of the picture: where it stands, and which share of each layer it keeps."""

    name: str
    limit: str
    top: int
    keeps: tuple[int, ...]


BOARDS = (
    Board("Jetson", "3 ms", 20, (8, 10, 9, 6)),
    Board("Raspberry Pi", "2 MB", 112, (6, 7, 6, 6)),
    Board("STM32", "400 KB", 204, (4, 3, 3, 6)),
)


def text(x: float, y: float, content: str, size: int = 13, anchor: str = "middle", weight: str = "normal") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{INK}">{content}</text>'
    )


def network(
    left: float, middle: float, kept: tuple[int, ...], colour: str, scale: float = 1.0, rest: str = LOST
) -> list[str]:
    """Columns of channels around the height `middle`; those that are not kept have the colour `rest`."""
    shapes = []
    for column, (whole, count) in enumerate(zip(LAYERS, kept, strict=True)):
        size, pitch = CELL * scale, (CELL + GAP) * scale
        top = middle - whole * pitch / 2
        for row in range(whole):
            fill = colour if row < count else rest
            x, y = left + column * STEP * scale, top + row * pitch
            shapes.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{size:.1f}" height="{size:.1f}" rx="1.5" fill="{fill}"/>'
            )
    return shapes


def arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    line = f"M{x0:g},{y0:g} L{x1:g},{y1:g}"
    return f'<path d="{line}" stroke="{INK}" stroke-width="1.4" fill="none" marker-end="url(#tip)"/>'


def picture() -> str:
    middle = HEIGHT / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" role="img">',
        "<title>One network is pruned for each board, each board trains its submodel, and all are merged</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        *network(30, middle, LAYERS, MOVED),
        text(74, 50, "one network", weight="bold"),
        text(74, 262, "global checkpoint"),
        text(205, 24, "cahfp prune", weight="bold"),
        text(640, 24, "cahfp reconstruct", weight="bold"),
    ]
    for board in BOARDS:
        height = board.top + 45
        parts += [
            arrow(140, middle + (height - middle) * 0.2, 272, height),
            f'<rect x="282" y="{board.top}" width="270" height="84" rx="8" fill="none" stroke="{INK}"/>',
            *network(298, height - 3, board.keeps, TRAINED, 0.5),
            text(368, board.top + 26, board.name, anchor="start", weight="bold"),
            text(368, board.top + 45, f"fits {board.limit}", anchor="start"),
            text(368, board.top + 64, "trains on its own data", anchor="start"),
            arrow(562, height, 716, middle + (height - middle) * 0.2),
        ]
    parts += [
        *network(742, middle, (8, 10, 9, 6), TRAINED, rest=MOVED),
        text(786, 50, "one network", weight="bold"),
        text(786, 262, "what all learnt"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parents[1] / "docs" / "overview.svg")
    parser.parse_args().output.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
