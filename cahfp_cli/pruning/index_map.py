"""Which entries of the global checkpoint a submodel holds: per tensor and axis, the surviving indices.

Pure data: using a map needs no model code and no torch. In the file each distinct index array is stored once, as
`index.0`, `index.1`, ... (int32); the metadata key `cahfp` holds the table from tensor names to arrays.

A submodel whose surviving channels were compensated for the removed ones has *factors*: along an axis of a weight, what
each surviving slice was multiplied with (`factor.0`, ..., float32). `scatter` and reconstruction take them out again,
so that what compensated one device's submodel never reaches the global checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from cahfp_cli.checkpoint.dtypes import DTYPES, FLOATS, Array, dtype_code
from cahfp_cli.checkpoint.metadata import Digest, Provenance, Record, dump_metadata, read_metadata
from cahfp_cli.checkpoint.safetensors_file import MAX_AXES, MAX_SIZE, SafetensorsFile, open_safetensors
from cahfp_cli.checkpoint.sharded import Tensors
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.coupling.rewrites import Rewrite
from cahfp_cli.errors import InputError

Indices = NDArray[np.int32]
Factors = NDArray[np.float32]
Selector = tuple[slice | NDArray[np.intp], ...]

INDEX, FACTOR = "index", "factor"
LEAST_FACTOR = 2.0**-6
"""All factors of an entry together are within this and its inverse: what a client changed is divided by them."""
ROOM_BYTES = 1 << 18
TENSOR_BYTES, AXIS_BYTES, ENTRY_BYTES = 100, 200, 8  # two arrays in the header; an int32 and a float32
STATISTICS = frozenset({"running_mean", "running_var"})


def last_name(tensor: str) -> str:
    """What a tensor is called in its module."""
    return tensor.rpartition(".")[2]


def is_statistic(tensor: str) -> bool:
    """Whether a tensor is a running mean or variance."""
    return last_name(tensor) in STATISTICS


@dataclass(frozen=True, eq=False)
class TensorMap:
    """One tensor: `shape` and `dtype` (safetensors code) are those of the global checkpoint; `axes` has, per axis,
    the surviving indices (int32, strictly increasing) or None where the whole axis survives. `factors` has, per axis,
    what each surviving slice was multiplied with (float32, see `LEAST_FACTOR`) or None; it is empty if nothing was.

    Raises: InputError: an axis whose indices are not that, or are not in the tensor; factors that do not fit.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[Indices | None, ...]
    factors: tuple[Factors | None, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {shown(self.dtype)} is none of {', '.join(DTYPES)}.")
        _check_axes(self.shape, self.axes)
        if self.factors:
            _check_factors(self)

    @property
    def submodel_shape(self) -> tuple[int, ...]:
        pairs = zip(self.axes, self.shape, strict=True)
        return tuple(length if indices is None else len(indices) for indices, length in pairs)


@dataclass(frozen=True, eq=False)
class BufferMap:
    """As `TensorMap`, of a buffer that the model's code makes and no checkpoint holds."""

    shape: tuple[int, ...]
    axes: tuple[Indices | None, ...]

    def __post_init__(self) -> None:
        _check_axes(self.shape, self.axes)


@dataclass(frozen=True, eq=False)
class IndexMap:
    """All tensors of a submodel, and what else of the model's code its widths change.

    checkpoint: the content digest of the global checkpoint that it belongs to.
    buffers: those that no checkpoint holds and that lose entries. rewrites: numbers in the code.
    """

    checkpoint: str
    tensors: dict[str, TensorMap]
    buffers: Mapping[str, BufferMap] = field(default_factory=dict)
    rewrites: tuple[Rewrite, ...] = ()


def weights_of(index_map: IndexMap) -> set[str]:
    """The float tensors that are not running statistics: those that a client may report its curvature for."""
    return {name for name, entry in index_map.tensors.items() if entry.dtype in FLOATS and not is_statistic(name)}


def without_factors(index_map: IndexMap) -> IndexMap:
    """The map of the same submodel if nothing had been compensated."""
    tensors = {
        name: replace(entry, factors=()) if entry.factors else entry for name, entry in index_map.tensors.items()
    }
    return replace(index_map, tensors=tensors)


def gather(array: Array, tensor_map: TensorMap) -> Array:
    """The submodel's tensor, a new array of `submodel_shape`, from the global one; without factors no bit changes.

    Raises: InputError: `array` does not have the shape or dtype of the map, or its dtype cannot hold it times its
        factors.
    """
    _check_array(array, tensor_map.shape, tensor_map.dtype)
    chosen = np.array(array[selector(tensor_map.axes, tensor_map.shape)], dtype=array.dtype, copy=True, order="C")
    if not tensor_map.factors:
        return chosen
    return _finite(scaled(chosen, tensor_map.factors), "times its factors")


def scatter(submodel_array: Array, tensor_map: TensorMap, into: Array) -> None:
    """Write the submodel's tensor to its places in the global tensor `into`, in place; the inverse of `gather`.

    Where there are factors, `into` must hold the values that the submodel was cut from.

    Raises: InputError: an array does not have the shape or dtype of the map, or the dtype cannot hold the result.
    """
    _check_array(submodel_array, tensor_map.submodel_shape, tensor_map.dtype)
    _check_array(into, tensor_map.shape, tensor_map.dtype)
    places = selector(tensor_map.axes, tensor_map.shape)
    if tensor_map.factors:
        with np.errstate(over="ignore", invalid="ignore"):
            restored = unscaled(submodel_array, into[places], tensor_map.factors).astype(into.dtype)
        submodel_array = _finite(restored, "without its factors")
    into[places] = submodel_array


def scaled(array: Array, factors: tuple[Factors | None, ...]) -> Array:
    """The array times the factors of each axis, in float32 (F64: in float64), rounded to its own dtype, which must be a
    float one if there are factors. What the dtype cannot hold becomes infinite or NaN.

    Server and device must get the same bits, so there is no wider product: not every library rounds float64 to a
    16-bit number in the same way.
    """
    product = factor_product(factors)
    if product is None:
        return array
    wide = np.float64 if array.dtype == np.float64 else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray((array.astype(wide) * product.astype(wide)).astype(array.dtype))


def unscaled(array: Array, original: Array, factors: tuple[Factors | None, ...]) -> NDArray[np.float64]:
    """What an array that was `scaled(original, factors)` and then trained is without the factors, in float64.

    Exact: where the factor is 1, the result is `array`; where training left an entry as it was, it is `original`, both
    bit for bit; where it moved it by d, the result is original + d / factor.
    """
    product = factor_product(factors)
    trained, before = array.astype(np.float64), original.astype(np.float64)
    if product is None:
        return trained
    moved = trained - scaled(original, factors).astype(np.float64)
    restored = np.where(moved == 0, before, before + moved / product)
    return np.asarray(np.where(product == 1, trained, restored))  # the sum may lose digits of a small `trained`


def factor_product(factors: tuple[Factors | None, ...]) -> NDArray[np.float64] | None:
    """All factors of a tensor as one array that broadcasts against it, None without any."""
    product = None
    for axis, along in enumerate(factors):
        if along is not None:
            shape = [-1 if other == axis else 1 for other in range(len(factors))]
            own = along.astype(np.float64).reshape(shape)
            product = own if product is None else product * own
    return product


def selector(axes: tuple[NDArray[np.integer] | None, ...], shape: tuple[int, ...]) -> Selector:
    """What to index an array of `shape` with to reach the coordinates that `axes` select (None = whole axis).

    Whole axes and runs without a gap are slices, which NumPy copies fastest, except between two axes that are index
    arrays: there they must be arrays too, because NumPy moves separated index arrays' axes to the front.
    """
    chosen: list[slice | NDArray[np.intp]] = [_run(indices) for indices in axes]
    arrays = [axis for axis, one in enumerate(chosen) if not isinstance(one, slice)]
    if arrays:
        between = range(arrays[0], arrays[-1] + 1)
        grids = np.ix_(*(np.arange(shape[axis])[chosen[axis]] for axis in between))
        chosen[arrays[0] : arrays[-1] + 1] = grids
    return tuple(chosen)


def _run(indices: NDArray[np.integer] | None) -> slice | NDArray[np.intp]:
    """A slice where increasing indices leave nothing out."""
    if indices is None:
        return slice(None)
    if len(indices) and indices[-1] - indices[0] == len(indices) - 1:
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return indices.astype(np.intp)


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
    """See `coupling.rewrites.Rewrite`."""

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


def check_against(index_map: IndexMap, file: Tensors) -> None:
    """Check that the map's tensors are those of the global checkpoint `file`, with the same shapes and dtypes.

    Integer and boolean tensors of the checkpoint may be absent from the map; every float tensor must be there.

    Raises: InputError: names differ, or a shape or dtype does.
    """
    extra = sorted(index_map.tensors.keys() - file.tensors.keys())
    floats = {name for name, info in file.tensors.items() if info.dtype in FLOATS}
    missing = sorted(floats - index_map.tensors.keys())
    if extra:
        raise InputError(f"{file.path}: it lacks tensors that the index map names: {listed(extra)}.")
    if missing:
        raise InputError(f"{file.path}: the index map lacks tensors of this checkpoint: {listed(missing)}.")
    for name, entry in index_map.tensors.items():
        info = file.tensors[name]
        if (entry.shape, entry.dtype) != (info.shape, info.dtype):
            raise InputError(
                f"{file.path}: tensor {shown(name)} is {info.dtype} {list(info.shape)}, but the index map was made for "
                f"{entry.dtype} {list(entry.shape)}."
            )


def listed(names: list[str]) -> str:
    """The first names of a list, for a message."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(shown, names[:5])) + rest


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


def _check_axes(shape: tuple[int, ...], axes: tuple[Indices | None, ...]) -> None:
    if len(axes) != len(shape):
        raise InputError(f"it has {len(axes)} axes, but the global tensor has {len(shape)}.")
    for axis, (indices, length) in enumerate(zip(axes, shape, strict=True)):
        if indices is not None:
            _check_indices(indices, length, axis)


def _check_indices(indices: Indices, length: int, axis: int) -> None:
    if indices.dtype != np.int32 or indices.ndim != 1:
        raise InputError(f"axis {axis} has {indices.dtype} indices with {indices.ndim} axes, not int32 with one.")
    if np.any(indices[1:] <= indices[:-1]):
        raise InputError(f"axis {axis} has indices that are repeated or not in increasing order.")
    if len(indices) and not 0 <= indices[0] <= indices[-1] < length:
        wrong = indices[0] if indices[0] < 0 else indices[-1]
        raise InputError(
            f"axis {axis} has index {wrong}, but the global tensor has length {length} there (0-{length - 1})."
        )


def _check_factors(entry: TensorMap) -> None:
    if entry.dtype not in FLOATS:
        raise InputError(f"it has factors, but is {entry.dtype}: only weights of real numbers are scaled.")
    if len(entry.factors) != len(entry.shape) or len(entry.shape) < 2:
        raise InputError(
            f"it has factors for {len(entry.factors)} axes; it has {len(entry.shape)}, and vectors have none."
        )
    if all(along is None for along in entry.factors):
        raise InputError("it has factors, but along no axis.")
    least = greatest = 1.0  # of the products over the axes, which may be too many to form
    for axis, (along, length) in enumerate(zip(entry.factors, entry.submodel_shape, strict=True)):
        if along is None:
            continue
        if along.dtype != np.float32 or along.shape != (length,):
            raise InputError(f"axis {axis} has {along.dtype} factors of shape {along.shape}, not float32 ({length},).")
        if length:
            least, greatest = least * float(along.min()), greatest * float(along.max())
        if not LEAST_FACTOR <= least <= greatest <= 1 / LEAST_FACTOR:
            raise InputError(
                f"axis {axis} has a factor that, times those of the axes before it, is not within {LEAST_FACTOR:g} and "
                f"{1 / LEAST_FACTOR:g}."
            )


def _finite(array: Array, when: str) -> Array:
    if not np.all(np.isfinite(array)):
        raise InputError(
            f"{when}, a tensor has numbers too large for {dtype_code(array.dtype)}; "
            "keep the checkpoint in a wider dtype."
        )
    return array


def _check_array(array: Array, shape: tuple[int, ...], dtype: str) -> None:
    if array.shape != shape or dtype_code(array.dtype) != dtype:
        raise InputError(
            f"an array is {array.dtype} {list(array.shape)}, but the index map says {dtype} {list(shape)}."
        )
