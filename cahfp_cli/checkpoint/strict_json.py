"""JSON of files that an attacker may have written: no duplicate keys, no NaN, bounded depth, and only real text."""

import json
from pathlib import Path
from typing import Any, NoReturn

from cahfp_cli.errors import InputError

MAX_DEPTH = 64


def parse(text: bytes | str) -> Any:
    """Parse UTF-8 JSON strictly.

    Raises: ValueError: not UTF-8, not JSON, a key given twice, NaN or Infinity, lone surrogates, or nested deeper
        than MAX_DEPTH; the message says which, in a few words.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at character {error.pos})") from None
    _check(value)
    return value


def read(path: Path, max_bytes: int, *, too_large: str, damaged: str) -> Any:
    """Parse a JSON file strictly.

    Args: too_large, damaged: what to say of, and to do about, a file of more than `max_bytes`, and one that `parse`
        refuses.
    Raises: InputError: either of these, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    if len(text) > max_bytes:
        raise InputError(f"{path}: {too_large}")
    try:
        return parse(text)
    except ValueError as error:
        raise InputError(f"{path}: {error}.\n{damaged}") from None


def shown(name: str) -> str:
    """A name from a file, safe and short enough for a message: quoted, control characters escaped."""
    return repr(name if len(name) <= 160 else name[:157] + "...")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(twice)} is given twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is not a JSON number")


def _check(value: Any) -> None:
    """Walk level by level: refuse depth beyond the bound, strings that are not Unicode text, and infinite floats."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, str) and not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                raise ValueError("a string holds half of a surrogate pair")
            if isinstance(item, float) and item in (float("inf"), float("-inf")):
                raise ValueError("it holds a number that is too large")
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        level = below
