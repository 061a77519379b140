"""Calls in which the user's code gives numbers that depend on widths: sizes of views, bounds of cuts, factors.

A model that says `x.reshape(batch, length, channels)` with a width of its own knows nothing of the slice. What the
numbers of such a call must be follows from the labels of the tensors that it made in the full model: that is `wanted`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from cahfp_cli.formats.rewrites import Number

NUMBERS = (int, float, torch.SymInt, torch.SymFloat)  # the exporter runs code with symbols for sizes


class CallKey(NamedTuple):
    """A call in one activation of a module: the `time`-th of a function at a place (see `rewrites.Rewrite`). Its place
    rather than its number in a sequence, since code that runs only once, or only in training, would shift the others.
    """

    function: str
    place: str
    time: int


@dataclass(frozen=True)
class CallRecord:
    """One such call of a trace.

    module: path of the module whose forward made it, None outside the model.
    call: which of its calls it is.
    source: the trace's value that is its first tensor, None without one. results: the values that it returned.
    """

    module: str | None
    call: CallKey
    numbers: tuple[Number, ...]
    source: int | None
    results: tuple[int, ...]


class Widths(Protocol):
    """What a mask predicts of a trace's values."""

    def shape(self, value: int) -> tuple[int, ...]:
        """The shape of a value."""

    def before(self, value: int, axis: int, index: int) -> int:
        """How many of the first `index` entries of an axis survive."""

    def length(self, value: int, axis: int) -> int:
        """The length of an axis in the full model."""


def map_numbers(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same arguments with every number `change(number)`, in order: in lists, tuples, slices and dicts too."""
    if isinstance(value, bool):
        return value
    if isinstance(value, NUMBERS):
        return change(value)
    if isinstance(value, slice):
        return slice(*(map_numbers(part, change) for part in (value.start, value.stop, value.step)))
    if isinstance(value, list | tuple):
        parts = [map_numbers(part, change) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, dict):
        return {key: map_numbers(part, change) for key, part in value.items()}
    return value


def numbers_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Number]:
    """Every number among the arguments, in the order of `map_numbers`."""
    found: list[Number] = []

    def note(number: Any) -> Any:
        found.append(number)
        return number

    map_numbers((tuple(args), dict(kwargs)), note)
    return found


Wanted = Callable[[Widths, CallRecord, Sequence[Any], Mapping[str, Any]], list[Number]]


def sizes_from(record: CallRecord, first: int, sizes: Sequence[int]) -> list[Number]:
    """The full model's numbers, those from `first` on replaced by sizes; -1 stays what it is."""
    numbers = list(record.numbers)
    for i, size in enumerate(sizes[: len(numbers) - first]):
        if numbers[first + i] != -1:
            numbers[first + i] = size
    return numbers


def sizes(widths: Widths, record: CallRecord, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Number]:
    """Calls that name the shape of their result, axis by axis."""
    return sizes_from(record, 0, widths.shape(record.results[0]))


def last_sizes(widths: Widths, record: CallRecord, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Number]:
    """Normalisations, which name the last axes of their input."""
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
    count = len(shape) if isinstance(shape, list | tuple) else 1
    return sizes_from(record, 0, widths.shape(record.results[0])[-count:])


def unflattened(widths: Widths, record: CallRecord, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Number]:
    """`unflatten(x, axis, sizes)`."""
    shape = widths.shape(record.results[0])
    axis = int(record.numbers[0])
    if axis < 0:
        axis += len(shape) - (len(record.numbers) - 1) + 1
    return sizes_from(record, 1, shape[axis:])


def parts(widths: Widths, record: CallRecord, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Number]:
    """`split(x, size or sizes, axis)`."""
    axis = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    lengths = [widths.shape(result)[axis] for result in record.results]
    given = next((v for k, v in kwargs.items() if k.startswith("split_size")), args[1] if len(args) > 1 else None)
    return sizes_from(record, 0, lengths if isinstance(given, list | tuple) else lengths[:1])


def narrowed(widths: Widths, record: CallRecord, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Number]:
    """`narrow(x, axis, start, length)`."""
    if record.source is None or len(record.numbers) != 3:
        return list(record.numbers)
    axis, start, _ = (int(number) for number in record.numbers)
    return [axis, bound(widths, record.source, axis, start), widths.shape(record.results[0])[axis]]


def indexed(widths: Widths, record: CallRecord, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Number]:
    """`x[...]`: the bounds of its slices."""
    if record.source is None or len(args) < 2:
        return list(record.numbers)
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    full = iter(record.numbers)
    wanted: list[Number] = []
    axes = len(widths.shape(record.source))
    taken = sum(1 for part in index if part is not None and part is not Ellipsis)
    axis = 0
    for part in index:
        if part is Ellipsis:
            axis += axes - taken
        elif isinstance(part, slice):
            for limit in (part.start, part.stop):
                if isinstance(limit, NUMBERS):
                    wanted.append(bound(widths, record.source, axis, int(next(full))))
            if isinstance(part.step, NUMBERS):
                wanted.append(next(full))
            axis += 1
        elif isinstance(part, torch.Tensor) and part.dtype == torch.bool:
            axis += part.dim()
        elif part is not None:
            wanted.extend(next(full) for _ in numbers_in((part,), {}))
            axis += 1
    return wanted


def bound(widths: Widths, value: int, axis: int, limit: int) -> int:
    """Where a bound of the full axis lies in the sliced one; one beyond the end stays as it is."""
    length = widths.length(value, axis)
    if limit >= length or limit < -length:
        return limit
    survivors, sliced = widths.before(value, axis, limit % length), widths.shape(value)[axis]
    if limit < 0:
        return survivors - sliced or sliced  # the end has no negative number
    return survivors


def factors(widths: Widths, record: CallRecord, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Number]:
    """Arithmetic: a factor that was computed from a width stays what it is in the full model. Integers are left
    alone: they may be strides, which follow the widths."""
    integers = any(isinstance(value, torch.Tensor) and not value.is_floating_point() for value in args)
    return numbers_in(args, kwargs) if integers else list(record.numbers)


CONTRACTING: dict[Callable[..., Any], tuple[int, int]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), (0, 1)),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), (0, 1)),
    **dict.fromkeys((torch.nn.functional.linear, torch.mm, torch.matmul), (0, -1)),
    **dict.fromkeys((torch.Tensor.mm, torch.Tensor.matmul, torch.Tensor.__matmul__), (0, -1)),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), (0, -1)),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), (1, -1)),
}
"""Functions that contract channels: the position of the argument that holds them, and their axis in it."""


def channels_read(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The argument of a contracting function that holds the channels."""
    position = CONTRACTING[func][0]
    found = args[position] if position < len(args) else kwargs["mat1" if position else "input"]
    assert isinstance(found, torch.Tensor)
    return found


VALUE_READERS = frozenset(
    {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__"}
    | {"nonzero", "masked_select", "unique", "unique_consecutive", "equal", "is_nonzero", "argwhere", "bincount"}
)
"""Functions by which code may go another way for other data: they return what tensors hold, or as many rows."""

SIZES = frozenset(
    {"view", "reshape", "expand", "broadcast_to"}
    | {"new_zeros", "new_ones", "new_empty", "new_full", "zeros", "ones", "empty", "full"}
)
"""Functions that are told the shape of their result."""

WANTED: dict[str, Wanted] = {
    **dict.fromkeys(SIZES, sizes),
    **dict.fromkeys(("layer_norm", "rms_norm"), last_sizes),
    "unflatten": unflattened,
    **dict.fromkeys(("split", "split_with_sizes"), parts),
    "narrow": narrowed,
    "__getitem__": indexed,
    **dict.fromkeys(("mul", "mul_", "div", "div_", "pow", "pow_", "add", "sub", "rsub", "true_divide"), factors),
    **dict.fromkeys(("__rpow__", "__rdiv__", "__rtruediv__", "__rsub__", "__ipow__", "float_power"), factors),
}
"""What the numbers of a call must be, by the name of its function."""
