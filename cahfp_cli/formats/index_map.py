"""Which entries of the global checkpoint a submodel holds: per tensor and axis, the surviving indices.

Pure data: using a map needs no model code and no torch.

A submodel whose surviving channels were compensated for the removed ones has *factors*: along an axis of a weight, what
each surviving slice was multiplied with. `scatter` and reconstruction take them out again, so that what compensated one
device's submodel never reaches the global checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cahfp_cli.checkpoint.dtypes import DTYPES, FLOATS
from cahfp_cli.checkpoint.sharded import Tensors
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.errors import InputError
from cahfp_cli.formats.axes import Indices, check_axes
from cahfp_cli.formats.factors import Factors, check_factors
from cahfp_cli.formats.rewrites import Rewrite

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
    what each surviving slice was multiplied with (float32, see factors.py) or None; it is empty if nothing was.

    Raises: InputError: an axis whose indices are not that, or are not in the tensor; factors that do not fit.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[Indices | None, ...]
    factors: tuple[Factors | None, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {shown(self.dtype)} is none of {', '.join(DTYPES)}.")
        check_axes(self.shape, self.axes)
        if self.factors:
            check_factors(self.dtype, self.submodel_shape, self.factors)

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
        check_axes(self.shape, self.axes)


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
