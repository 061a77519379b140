"""Quantities as people write them: `5ms`, `64MB`, `0.5`, `50%`, `30M`; read exactly, printed in three digits."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from cahfp_cli.errors import UsageError

SECONDS = {"s": Fraction(1), "ms": Fraction(1, 10**3), "us": Fraction(1, 10**6), "ns": Fraction(1, 10**9)}
BYTES = {
    "B": Fraction(1),
    **{f"{prefix}B": Fraction(1000**power) for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}iB": Fraction(1024**power) for power, prefix in enumerate("KMGT", start=1)},
    "kB": Fraction(1000),
}
PERCENT = "%"
SHARES = {PERCENT: Fraction(1, 100)}
COUNTS = {"K": Fraction(10**3), "k": Fraction(10**3), "M": Fraction(10**6), "G": Fraction(10**9)}

TIME_EXAMPLES = "5ms, 1.5s, 200us"
SIZE_EXAMPLES = "64MB (10^6 bytes), 2MiB (2^20 bytes), 512KB"
LIMIT_EXAMPLES = "0.5 or 50% (half of the full network), 30M, 1.2G"
SHARE_EXAMPLES = "0.5, 0.25, 25%"

_QUANTITY = re.compile(r"\s*(\d{1,99}(?:\.\d{0,99})?|\.\d{1,99})(e[+-]?\d{1,3})?\s*([A-Za-zµμ]*|%)\s*", re.ASCII)


@dataclass(frozen=True)
class Share:
    """A limit as a share of the full network's value, in (0, 1]."""

    value: float


@dataclass(frozen=True)
class Count:
    """An absolute limit, at least 1."""

    value: int


Limit = Share | Count


def parse_seconds(text: str) -> float:
    """`5ms` -> 0.005; a plain number is seconds. Raises UsageError unless it is a positive time."""
    return float(_positive(text, SECONDS, "a time", TIME_EXAMPLES))


def parse_bytes(text: str) -> int:
    """`64MB` -> 64_000_000; a plain number is bytes; a fraction of a byte is dropped, never rounded up.

    Raises UsageError unless it is a size of at least one byte.
    """
    return _at_least_one(_positive(text, BYTES, "a size", SIZE_EXAMPLES), text, "a size", SIZE_EXAMPLES)


def parse_limit(text: str) -> Limit:
    """`0.5` or `50%` -> Share(0.5), `30M` -> Count(30_000_000); a plain number up to 1 is a share, above it a whole
    count.

    Raises UsageError for anything else.
    """
    what = "a share or a count"
    if text.rstrip().endswith(PERCENT):
        return Share(_share(text, what, LIMIT_EXAMPLES))
    number = _positive(text, COUNTS, what, LIMIT_EXAMPLES)
    if not text.strip()[-1].isalpha():
        if number <= 1:
            return Share(float(number))
        if number.denominator != 1:
            raise _bad(text, what, LIMIT_EXAMPLES)
    return Count(_at_least_one(number, text, what, LIMIT_EXAMPLES))


def parse_share(text: str) -> float:
    """`0.5` or `50%` -> 0.5. Raises UsageError unless it is in (0, 1]."""
    return _share(text, "a share", SHARE_EXAMPLES)


def format_seconds(seconds: float) -> str:
    """0.005 -> `5 ms`, in three digits."""
    return _scaled(seconds, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)))


def format_bytes(size: float) -> str:
    """64_000_000 -> `64 MB`, in three digits and decimal units."""
    return _scaled(size, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("B", 1.0)))


def format_count(count: float) -> str:
    """11_173_962 -> `11.2M`, in three digits."""
    return _scaled(count, (("G", 1e9), ("M", 1e6), ("K", 1e3), ("", 1.0))).replace(" ", "")


def format_limit(limit: Limit) -> str:
    """Share(0.5) -> `50%`, Count(30_000_000) -> `30M`."""
    return f"{limit.value * 100:.3g}%" if isinstance(limit, Share) else format_count(limit.value)


def _positive(text: str, units: Mapping[str, Fraction], what: str, examples: str) -> Fraction:
    """The value of `text` in base units, exact; UsageError unless it is positive and its unit is known."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise _bad(text, what, examples)
    digits, exponent, unit = match.groups()
    factor = Fraction(1) if not unit else units.get(unit.replace("µ", "u").replace("μ", "u"))
    if factor is None:
        raise _bad(text, what, examples)
    number = Fraction(digits + (exponent or "")) * factor
    # Beyond these bounds nothing physical is meant, and the conversion to a float would overflow or underflow.
    if not Fraction(1, 10**30) <= number <= 10**30:
        raise _bad(text, what, examples)
    return number


def _share(text: str, what: str, examples: str) -> float:
    share = _positive(text, SHARES, what, examples)
    if share > 1:
        raise _bad(text, what, examples)
    return float(share)


def _at_least_one(number: Fraction, text: str, what: str, examples: str) -> int:
    if number < 1:
        raise _bad(text, what, examples)
    return math.floor(number)


def _bad(text: str, what: str, examples: str) -> UsageError:
    return UsageError(f"'{text}' is not {what}: write for example {examples}")


def _scaled(value: float, units: tuple[tuple[str, float], ...]) -> str:
    """`value` in the largest unit that leaves at least 1 after rounding to three digits."""
    rounded = float(f"{value:.3g}")
    name, scale = next((unit for unit in units if abs(rounded) >= unit[1] * (1 - 1e-12)), units[-1])
    number = f"{rounded / scale:.3g}"
    return f"{float(number):g} {name}".rstrip()
