"""What exporters and quantisers say, as one plain line that names the operator."""

import re
from collections.abc import Iterator

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
OPERATOR = re.compile(r"<OpOverload\(op='([^']+)', overload='[^']*'\)>")
TARGET = re.compile(r"target=torch\.ops\.([\w.]+)")
NOISE = ("This is step", "Next steps:", "Failed to ")
"""How the lines begin, or what they hold, that only say that something went wrong."""
LONGEST = 300


def plain(error: BaseException) -> str:
    """The reason behind an exporter's error: the operator that it cannot express, else its innermost message.

    Such errors wrap each other, with advice to developers in the outer ones and escape codes of terminals.
    """
    messages = [ESCAPE.sub("", str(one)) for one in chain(error)]
    found = next((m.group(1) for text in reversed(messages) for m in [OPERATOR.search(text)] if m), None)
    if found is not None:
        return f"ONNX has no form of the operator {found} that the exporter knows"
    lines = [line.strip() for text in reversed(messages) for line in text.splitlines() if line.strip()]
    said = next((line for line in lines if not any(noise in line for noise in NOISE)), type(error).__name__)
    place = next((m.group(1) for text in messages for m in [TARGET.search(text)] if m), None)
    said = said if len(said) <= LONGEST else f"{said[:LONGEST]}..."
    return said if place is None or place in said else f"at the operator {place}: {said}"


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, its cause, the cause's cause."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__
