"""The device profile: one device as pure data, in which no figure can stand without its unit and its source."""

import difflib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from cahfp_cli.device.quantities import Limit, parse_bytes, parse_limit, parse_seconds, parse_share
from cahfp_cli.errors import InputError, UsageError

Parsed = TypeVar("Parsed")
Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Text = Annotated[str, Field(pattern=r"\S")]


class Record(BaseModel):
    """A frozen schema that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Figure(Record):
    """One number with its unit and where it comes from: a document, a measurement, or how it was estimated."""

    UNITS: ClassVar[Mapping[str, float]] = {}

    value: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
    unit: Text
    source: Text

    @field_validator("unit")
    @classmethod
    def _unit_is_known(cls, unit: str) -> str:
        if unit not in cls.UNITS:
            raise ValueError(f"unit '{unit}' is not one of {', '.join(cls.UNITS)}")
        return unit

    @property
    def si(self) -> float:
        """The value in base units: operations, bytes, seconds, watts, or a bare number."""
        return self.value * self.UNITS[self.unit]


class Rate(Figure):
    """Arithmetic rate; a multiply-accumulate counts as two operations."""

    UNITS = {"MFLOP/s": 1e6, "GFLOP/s": 1e9, "TFLOP/s": 1e12, "GOP/s": 1e9, "TOP/s": 1e12}


class Bandwidth(Figure):
    """Bytes a second to and from memory."""

    UNITS = {"MB/s": 1e6, "GB/s": 1e9}


class Link(Figure):
    """Rate of a network link; `si` is bytes a second."""

    UNITS = {"kbit/s": 1e3 / 8, "Mbit/s": 1e6 / 8, "Gbit/s": 1e9 / 8, "MB/s": 1e6}


class Size(Figure):
    """A number of bytes."""

    UNITS = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}


class Duration(Figure):
    """A time; zero is allowed, for what a device does not pay."""

    UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
    value: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


class Power(Figure):
    """Electrical power."""

    UNITS = {"W": 1.0, "mW": 1e-3}


class Proportion(Figure):
    """A part of something, in (0, 1]."""

    UNITS = {"share": 1.0}
    value: Annotated[float, Field(strict=True, gt=0, le=1)]


class Factor(Figure):
    """A multiple of something, at least 1."""

    UNITS = {"times": 1.0}
    value: Annotated[float, Field(strict=True, ge=1, allow_inf_nan=False)]


class Channels(Figure):
    """A number of channels: a whole number, at least 1."""

    UNITS = {"channels": 1.0}
    value: Annotated[int, Field(strict=True, ge=1)]


class Runtime(Record):
    """What runs the model, and how: the conditions under which the figures hold, not figures themselves.

    architecture: where it is x86, int8 files get unsigned activations (see export/int8_layout.py).
    """

    name: Text
    provider: Text | None = None
    architecture: Literal["arm", "x86"] | None = None
    threads: Annotated[int, Field(strict=True, ge=1)]


class Peak(Record):
    """Arithmetic in one dtype: the rate on paper, and the share of it that dense kernels reach."""

    peak: Rate
    efficiency: Proportion

    @property
    def reached(self) -> float:
        """Operations a second that a dense kernel reaches."""
        return self.peak.si * self.efficiency.si


class Compute(Record):
    """Arithmetic by dtype; a dtype that the runtime does not take is absent."""

    fp32: Peak
    fp16: Peak | None = None
    int8: Peak | None = None

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that the runtime takes."""
        return tuple(name for name, peak in self if peak is not None)


class Memory(Record):
    """Main memory: its rate on paper, and either the measured copy rate or an estimated share of the paper rate."""

    bandwidth: Bandwidth
    copy_bandwidth: Bandwidth | None = None
    efficiency: Proportion | None = None
    cache: Size | None = None

    @model_validator(mode="after")
    def _one_way_to_the_reached_rate(self) -> "Memory":
        if (self.copy_bandwidth is None) == (self.efficiency is None):
            raise ValueError("give one of copy_bandwidth (measured) and efficiency (estimated), not both")
        if self.copy_bandwidth is not None and 2 * self.copy_bandwidth.si > self.bandwidth.si:
            raise ValueError("copy_bandwidth counts each copied byte once, so it is at most half of bandwidth")
        return self

    @property
    def reached(self) -> float:
        """Bytes a second of traffic, reads plus writes. A copied byte is read and written, so it counts twice."""
        if self.copy_bandwidth is not None:
            return 2 * self.copy_bandwidth.si
        assert self.efficiency is not None
        return self.bandwidth.si * self.efficiency.si


class Capacity(Record):
    """Installed RAM, and how much of RAM and of storage one model may take."""

    ram: Size
    model_ram: Size
    model_storage: Size

    @model_validator(mode="after")
    def _model_fits_in_ram(self) -> "Capacity":
        if self.model_ram.si > self.ram.si:
            raise ValueError("model_ram is more than the installed ram")
        return self


class Training(Record):
    """`memory_factor`: peak memory of a training step as a multiple of inference memory at the same batch size."""

    memory_factor: Factor


class Links(Record):
    """The network between the device and the server, as the device sees it."""

    uplink: Link
    downlink: Link


class Alignment(Record):
    """Channel counts that the kernels like: multiples of `hard` stay on the fast path, cost rises in `step`s."""

    hard: Channels
    step: Channels

    @model_validator(mode="after")
    def _step_keeps_to_hard(self) -> "Alignment":
        if self.step.value % self.hard.value:
            raise ValueError("step is not a multiple of hard")
        return self


class Overheads(Record):
    """Time paid for every operator, and once for every call of the model, before any arithmetic."""

    operator: Duration
    call: Duration


class OperatorClass(Record):
    """How fast kernels of one class were measured to be; a term that measurement left out is absent."""

    rate: Rate | None = None
    bandwidth: Bandwidth | None = None
    overhead: Duration
    line: Duration | None = None


class Calibration(Record):
    """Measured kernels, see device/latency.py; `loads`: of inputs by blocked convolutions, and `waits`: operations that
    they have time for while sums are awaited; `reorder`: bandwidth between plain and blocked channels, and
    `reorder_overhead` of each time; `weights`: bandwidth of weights; `used_once` and `streaming`: what those that a
    product with a vector uses once, and those that the cache cannot hold, take beyond that; `spread`: standard
    deviation of predictions from what was measured, as a share."""

    conv: OperatorClass
    narrow: OperatorClass
    odd: OperatorClass
    odd_pointwise: OperatorClass
    depthwise: OperatorClass
    odd_depthwise: OperatorClass
    matmul: OperatorClass
    pool: OperatorClass | None = None
    memory: OperatorClass
    math: OperatorClass
    clip: OperatorClass | None = None
    view: OperatorClass | None = None
    loads: Rate | None = None
    waits: Rate | None = None
    reorder: Bandwidth | None = None
    reorder_overhead: Duration | None = None
    weights: Bandwidth | None = None
    used_once: Bandwidth | None = None
    streaming: Bandwidth | None = None
    spread: Proportion | None = None


class PowerDraw(Record):
    """Power of the whole device while it computes, and while it waits."""

    active: Power
    idle: Power | None = None


def _with_unit(text: object) -> str:
    if not isinstance(text, str) or not text.strip()[-1:].isalpha():
        raise ValueError(f'{text!r} has no unit: write it in quotes with one, such as "20ms" or "64MB"')
    return text


def _plain(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{value!r} is not a number")
    return str(value)


def _seconds(text: object) -> float:
    return _as_value_error(parse_seconds, _with_unit(text))


def _bytes(text: object) -> int:
    return _as_value_error(parse_bytes, _with_unit(text))


def _limit(value: object) -> Limit:
    return _as_value_error(parse_limit, _plain(value))


def _share(value: object) -> float:
    return _as_value_error(parse_share, _plain(value))


def _as_value_error(parse: Callable[[str], Parsed], text: str) -> Parsed:
    """pydantic collects ValueErrors only, and adds to them where in the file they stand."""
    try:
        return parse(text)
    except UsageError as error:
        raise ValueError(str(error)) from None


class DefaultBudget(Record):
    """What a submodel for this device must fit when the user names no budget: a choice, with its `reason`.

    latency: seconds; memory, storage: bytes; macs, params: Share or Count; keep: share of the channels.
    """

    reason: Text
    latency: Annotated[float | None, BeforeValidator(_seconds)] = None
    memory: Annotated[int | None, BeforeValidator(_bytes)] = None
    storage: Annotated[int | None, BeforeValidator(_bytes)] = None
    macs: Annotated[Limit | None, BeforeValidator(_limit)] = None
    params: Annotated[Limit | None, BeforeValidator(_limit)] = None
    keep: Annotated[float | None, BeforeValidator(_share)] = None

    @model_validator(mode="after")
    def _limits_something(self) -> "DefaultBudget":
        if len(self.model_fields_set) < 2:
            raise ValueError("limits nothing: give at least one of latency, memory, storage, macs, params, keep")
        return self


class DeviceProfile(Record):
    """One device. docs/reference/profiles.md says what each figure means and how to write a profile of one's own."""

    format: Literal["cahfp.profile/1"]
    name: Name
    aliases: tuple[Name, ...] = ()
    description: Text
    runtime: Runtime
    compute: Compute
    memory: Memory
    capacity: Capacity
    training: Training
    links: Links
    alignment: Alignment | None = None
    overheads: Overheads
    calibration: Calibration | None = None
    power: PowerDraw | None = None
    budget: DefaultBudget | None = None

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Every figure with its dotted key, in the order of the schema."""
        return _figures(self, "")


def _figures(record: BaseModel, prefix: str) -> Iterator[tuple[str, Figure]]:
    for name, value in record:
        if isinstance(value, Figure):
            yield prefix + name, value
        elif isinstance(value, BaseModel):
            yield from _figures(value, f"{prefix}{name}.")


def read_profile(path: Path) -> DeviceProfile:
    """Read one profile.

    Raises InputError, naming the file and the key, if it is not TOML or breaks the schema; OSError if unreadable.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8, so not a device profile") from None
    return parse_profile(text, str(path))


def parse_profile(text: str, origin: str) -> DeviceProfile:
    """A profile from its text; `origin` says in errors where that came from. Raises: InputError: as `read_profile`."""
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of integers with too many digits
        raise InputError(f"{origin}: not valid TOML: {error}") from None
    try:
        return DeviceProfile.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{origin}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """The first problem in one sentence; a mistyped key goes first, because a missing key is often its shadow."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _sentence(problems[0]) + more


def _sentence(problem: ErrorDetails) -> str:
    location, kind = problem["loc"], problem["type"]
    key = ".".join(str(part) for part in location) or "the file"
    expected = _record_at(location)
    shape = _example(expected) if expected is not None else ""
    if kind == "extra_forbidden":
        parent = _record_at(location[:-1])
        known = list(parent.model_fields) if parent is not None else []
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known keys here are {', '.join(known)}"
        return f"unknown key '{key}': {hint}"
    if kind == "missing":
        return f"'{key}' is missing{shape}"
    if kind in ("model_type", "model_attributes_type"):
        return f"'{key}' must be a table{shape}"
    if kind == "string_pattern_mismatch":
        return (
            f"'{key}' is not a name: use a-z, 0-9 and single hyphens"
            if problem["input"].strip()
            else f"'{key}' is empty"
        )
    # pydantic opens with a capital letter and a stock phrase that says nothing about the file.
    message = re.sub(r"^(Value error, |Input )", "", problem["msg"])
    return f"'{key}' {message}" if message.startswith("should") else f"'{key}': {message}"


def _record_at(location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The schema that stands at a key, or None where a plain value does."""
    record: type[BaseModel] | None = DeviceProfile
    for part in location:
        field = record.model_fields.get(str(part)) if record is not None else None
        record = _record_in(field.annotation) if field is not None else None
    return record


def _record_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((record for part in get_args(annotation) if (record := _record_in(part)) is not None), None)


def _example(record: type[BaseModel]) -> str:
    if issubclass(record, Figure):
        units = " or ".join(f'"{unit}"' for unit in record.UNITS)
        return f': write {{ value = NUMBER, unit = {units}, source = "where it comes from" }}'
    return f" with the keys {', '.join(record.model_fields)}"
