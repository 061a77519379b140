"""Data specs: NAME[@train|@test][[first:last]], such as `digits@train[0:500]` or `npz:share.npz[100:]`."""

import re
from dataclasses import dataclass
from pathlib import Path

from cahfp_cli.data.dataset import Dataset, Rows, make_dataset, sliced
from cahfp_cli.data.digits import load_digits
from cahfp_cli.data.folder import load_folder
from cahfp_cli.data.idx import load_fashion_mnist, load_idx
from cahfp_cli.data.npz import load_npz
from cahfp_cli.errors import InputError, UsageError
from cahfp_cli.factories import nearest, run_factory

SPLITS = ("train", "test")
NAMES = ("digits", "fashion-mnist")
KINDS = ("idx", "npz", "folder")

SLICE = re.compile(r"\[(\d{0,18}):(\d{0,18})\]", flags=re.ASCII)


@dataclass(frozen=True)
class DataSpec:
    """A parsed data spec. split: None when the spec names none. Samples first..last-1, None for an open end."""

    source: str
    split: str | None = None
    first: int | None = None
    last: int | None = None

    @property
    def rows(self) -> Rows:
        return Rows(self.first, self.last)


def parse_spec(spec: str) -> DataSpec:
    """Take a data spec apart, from its end: a path may itself hold '@', '[' and ':'.

    Raises: UsageError: a slice or a split that is not understood, or no source.
    """
    source, first, last = spec, None, None
    if spec.endswith("]"):
        at = spec.rfind("[")
        found = SLICE.fullmatch(spec[at:]) if at >= 0 else None
        if found is None:
            raise UsageError(
                f"data {spec!r}: the slice is not understood. Write [first:last], such as [0:500] or [100:]."
            )
        first, last = (int(text) if text else None for text in found.groups())
        source = spec[:at]
    head, at_sign, tail = source.rpartition("@")
    split = None
    if at_sign and tail in SPLITS:
        source, split = head, tail
    elif at_sign and not {"/", ":", "."} & set(tail):
        raise UsageError(f"data {spec!r}: there is no split {tail!r}. Write @train or @test.")
    if not source:
        raise UsageError(f"data {spec!r}: names no data set. {choices()}")
    return DataSpec(source, split, first, last)


def load_data(spec: str, *, data_root: Path | None = None, default_split: str = "train") -> Dataset:
    """Load the data that a spec names; the Dataset's name is the spec.

    Args:
        data_root: folder of the files of a named set that does not come with the program (`fashion-mnist`).
        default_split: the split when the spec names none and the source has splits; a source without is taken whole.
    Raises: UsageError: the spec is not understood; InputError: the data is missing, malformed or out of range.
    """
    parsed = parse_spec(spec)
    return load_source(parsed, spec, data_root, default_split)


def load_source(parsed: DataSpec, spec: str, data_root: Path | None, default_split: str) -> Dataset:
    """The samples that a parsed spec names; of files no others are read."""
    rows = parsed.rows
    if parsed.source == "digits":
        return sliced(load_digits(parsed.split or default_split, spec), rows)
    if parsed.source == "fashion-mnist":
        return load_fashion_mnist(parsed.split or default_split, spec, data_root, rows)
    kind, colon, rest = parsed.source.partition(":")
    if kind in KINDS and not rest:
        raise UsageError(f"data {spec!r}: name a path after '{kind}:'.")
    match kind:
        case "idx":
            return load_idx(Path(rest), parsed.split or default_split, spec, rows)
        case "npz":
            return load_npz(Path(rest), parsed.split, default_split, spec, rows)
        case "folder":
            return load_folder(Path(rest), parsed.split, default_split, spec, rows)
    if colon:
        return sliced(load_factory(parsed, spec, default_split), rows)
    raise UsageError(f"no data set {parsed.source!r}.{nearest(parsed.source, list(NAMES))} {choices()}")


def load_factory(parsed: DataSpec, spec: str, default_split: str) -> Dataset:
    """Call the user's factory: it gets `split` (required if the spec names one) and returns a Dataset or (x, y)."""
    given = {} if parsed.split is None else {"split": parsed.split}
    result = run_factory(parsed.source, given, {"split": default_split})
    if isinstance(result, Dataset):
        return make_dataset(result.x, result.y, spec, result.classes)
    if isinstance(result, tuple) and len(result) == 2:
        return make_dataset(*result, spec)
    raise InputError(
        f"{parsed.source!r} returned a {type(result).__name__}: it must return a Dataset or (x, y) arrays."
    )


def choices() -> str:
    """What a data spec may be."""
    return (
        f"There are {', '.join(NAMES)}, idx:DIR, npz:FILE, folder:DIR, package.module:factory and "
        "path/to/file.py:factory."
    )
