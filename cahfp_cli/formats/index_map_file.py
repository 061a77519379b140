"""`index_map.safetensors`.

Each distinct array of indices is stored once, as `index.0`, `index.1`, ... (int32), and of factors as `factor.0`, ...
(float32); the metadata key `cahfp` holds the table from tensor names to arrays.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from cahfp_cli.checkpoint.dtypes import Array
from cahfp_cli.checkpoint.metadata import Digest, Provenance, Record, dump_metadata, read_metadata
from cahfp_cli.checkpoint.safetensors_file import MAX_AXES, MAX_SIZE, SafetensorsFile, open_safetensors
from cahfp_cli.checkpoint.sharded import Tensors
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError
from cahfp_cli.formats.index_map import BufferMap, IndexMap, TensorMap, is_statistic
from cahfp_cli.formats.rewrites import Rewrite

INDEX, FACTOR = "index", "factor"
ROOM_BYTES = 1 << 18
TENSOR_BYTES, AXIS_BYTES, ENTRY_BYTES = 100, 200, 8  # two arrays in the header; an int32 and a float32
Size = Annotated[int, Field(ge=0, le=MAX_SIZE)]
Shape = Annotated[tuple[Size, ...], Field(max_length=MAX_AXES)]
AxisNumbers = Annotated[tuple[Size | None, ...], Field(max_length=MAX_AXES)]


class TensorRecord(Record):
    """A tensor in the table: each entry of `axes` is the number of an index array, or null for a whole axis; each of
    `factors` the number of a factor array, or null. A tensor without factors has no such key."""

    shape: Shape
    dtype: str
    axes: AxisNumbers
    factors: Annotated[AxisNumbers, Field(min_length=1)] | None = None

    @model_serializer(mode="wrap")
    def _fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {key: value for key, value in fields.items() if key != "factors" or value is not None}


class BufferRecord(Record):
    """A buffer in the table."""

    shape: Shape
    axes: AxisNumbers


Count = Annotated[int, Field(ge=0, le=2**31)]
Scalar = Annotated[int, Field(ge=-(2**40), le=2**40)] | Annotated[float, Field(allow_inf_nan=False)]


class RewriteRecord(Record):
    """See `formats.rewrites.Rewrite`."""

    module: str
    training: bool
    function: str
    place: str
    argument: Count
    old: Scalar
    new: Scalar


class IndexMapMetadata(Record):
    """Metadata of `index_map.safetensors`."""

    format: Literal["cahfp.index_map/1"] = "cahfp.index_map/1"
    checkpoint: Digest
    tensors: dict[str, TensorRecord]
    buffers: dict[str, BufferRecord] = Field(default_factory=dict)
    rewrites: tuple[RewriteRecord, ...] = ()
    provenance: Provenance


def write_index_map(path: Path, index_map: IndexMap, provenance: Provenance) -> None:
    """Write exactly `path` (see checkpoint/atomic.py for safety); equal maps give equal bytes."""
    arrays: dict[str, Array] = {}

    def numbering(kind: str) -> Callable[[Array | None], int | None]:
        numbers: dict[bytes, int] = {}

        def number(array: Array | None) -> int | None:
            if array is None:
                return None
            place = numbers.setdefault(array.tobytes(), len(numbers))
            arrays[f"{kind}.{place}"] = array
            return place

        return number

    index, factor = numbering(INDEX), numbering(FACTOR)
    table = {
        name: TensorRecord(
            shape=entry.shape,
            dtype=entry.dtype,
            axes=tuple(map(index, entry.axes)),
            factors=tuple(map(factor, entry.factors)) or None,
        )
        for name, entry in sorted(index_map.tensors.items())
    }
    buffers = {
        name: BufferRecord(shape=entry.shape, axes=tuple(map(index, entry.axes)))
        for name, entry in sorted(index_map.buffers.items())
    }
    record = IndexMapMetadata(
        checkpoint=index_map.checkpoint,
        tensors=table,
        buffers=buffers,
        rewrites=tuple(RewriteRecord(**asdict(rewrite)) for rewrite in index_map.rewrites),
        provenance=provenance,
    )
    save_arrays(path, arrays, dump_metadata(record))


def read_index_map(path: Path, checkpoint: Tensors | None = None) -> IndexMap:
    """Read and validate a map.

    Args: checkpoint: a global checkpoint that the map is to belong to (`check_against` tells whether it does): a file
        larger than any map of it is refused before it is decoded.
    Raises: InputError: not a sound safetensors file, a table that does not fit the schema, references to arrays that
        are not there, indices that are not int32, one-dimensional, strictly increasing and within their axis, or
        factors that are not float32, within their bounds and of a weight.
    """
    limits = () if checkpoint is None else (most_bytes(checkpoint), most_header(checkpoint))
    with open_safetensors(path, *limits) as file:
        record = read_metadata(file, IndexMapMetadata)
        arrays = _read_arrays(file)
    tensors: dict[str, TensorMap] = {}
    buffers: dict[str, BufferMap] = {}
    used: set[str] = set()

    def look_up(name: str, kind: str, numbers: tuple[int | None, ...]) -> tuple[Any, ...]:
        keys = [None if number is None else f"{kind}.{number}" for number in numbers]
        for key in keys:
            if key is not None and key not in arrays:
                raise InputError(f"{path}: tensor {shown(name)} refers to '{key}', which is not in the file.")
        used.update(key for key in keys if key is not None)
        return tuple(None if key is None else arrays[key] for key in keys)

    entries: list[tuple[str, TensorRecord | BufferRecord]] = [*record.tensors.items(), *record.buffers.items()]
    for name, entry in entries:
        axes = look_up(name, INDEX, entry.axes)
        factors = look_up(name, FACTOR, entry.factors or ()) if isinstance(entry, TensorRecord) else ()
        try:
            if isinstance(entry, TensorRecord):
                if factors and is_statistic(name):
                    raise InputError("it has factors, but is a running statistic: only weights are scaled.")
                tensors[name] = TensorMap(entry.shape, entry.dtype, axes, factors)
            else:
                buffers[name] = BufferMap(entry.shape, axes)
        except InputError as error:
            raise InputError(
                f"{path}: tensor {shown(name)}: {error}\nThe map is damaged or belongs to another "
                "checkpoint: prune again."
            ) from None
    if used != arrays.keys():
        raise InputError(f"{path}: '{min(arrays.keys() - used)}' is used by no tensor; the map is damaged.")
    rewrites = tuple(Rewrite(**rewrite.model_dump()) for rewrite in record.rewrites)
    return IndexMap(record.checkpoint, tensors, buffers, rewrites)


def most_bytes(checkpoint: Tensors) -> int:
    """More bytes than a map of `checkpoint` has: each axis of each tensor with its own indices and factors, a table
    like the checkpoint's header with all quotes escaped, and room for provenance, buffers and rewrites."""
    lengths = [length for info in checkpoint.tensors.values() for length in info.shape]
    return most_header(checkpoint) + sum(ENTRY_BYTES * length for length in lengths)


def most_header(checkpoint: Tensors) -> int:
    """The part of `most_bytes` that is no indices or factors."""
    header = min((info.start for info in checkpoint.tensors.values()), default=0)  # of shards, that of the shortest
    header += sum(TENSOR_BYTES + 4 * len(name) for name in checkpoint.tensors)
    return ROOM_BYTES + 4 * header + AXIS_BYTES * sum(len(info.shape) for info in checkpoint.tensors.values())


def _read_arrays(file: SafetensorsFile) -> Mapping[str, Array]:
    names = {f"{kind}.{number}": kind for kind in (INDEX, FACTOR) for number in range(len(file.tensors))}
    arrays = {}
    for name, info in file.tensors.items():
        if name not in names:
            raise InputError(
                f"{file.path}: it holds a tensor {shown(name)}; an index map holds only index.0, index.1, ... and "
                "factor.0, factor.1, ..."
            )
        wanted, what = ("I32", "indices") if names[name] == INDEX else ("F32", "factors")
        if info.dtype != wanted or len(info.shape) != 1:
            raise InputError(
                f"{file.path}: '{name}' is {info.dtype} {list(info.shape)}; {what} are {wanted} with one axis."
            )
        arrays[name] = file.read(name)
    return arrays
