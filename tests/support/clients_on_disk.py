"""A global checkpoint and client submodels on disk, from random numbers; no torch."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cahfp_cli.checkpoint.digest import arrays_digest
from cahfp_cli.checkpoint.dtypes import DTYPES, dtype_code
from cahfp_cli.checkpoint.metadata import (
    CheckpointMetadata,
    CurvatureMetadata,
    ModelSpec,
    Provenance,
    SubmodelMetadata,
    dump_metadata,
    read_metadata,
)
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.formats.gathering import gather
from cahfp_cli.formats.index_map import IndexMap, TensorMap
from cahfp_cli.formats.index_map_file import IndexMapMetadata, write_index_map
from cahfp_cli.reconstruction.merge import reconstruct

PROVENANCE = Provenance(tool="cahfp 0", command="test")
MODEL = ModelSpec(spec="tests:network")


def load(path: Path) -> dict[str, np.ndarray]:
    with open_safetensors(path) as file:
        return {name: file.read(name) for name in file.tensors}


def bits(array: np.ndarray) -> bytes:
    return array.tobytes()


def network(random: np.random.Generator, dtype: str = "F32", widths=(3, 6, 5)) -> dict[str, np.ndarray]:
    """Two convolutions with batch norm, a linear head, a scalar, counters."""
    kind = DTYPES[dtype]

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(kind)

    tensors = {"scale": np.asarray(random.normal(), kind), "head.weight": normal(4, widths[2]), "head.bias": normal(4)}
    for layer in (1, 2):
        width = widths[layer]
        tensors[f"conv{layer}.weight"] = normal(width, widths[layer - 1], 3, 3)
        tensors[f"bn{layer}.weight"] = normal(width)
        tensors[f"bn{layer}.running_mean"] = normal(width)
        tensors[f"bn{layer}.running_var"] = (random.random(width) + 0.1).astype(kind)
        tensors[f"bn{layer}.num_batches_tracked"] = np.asarray(random.integers(0, 100), np.int64)
    for tensor in tensors.values():
        if tensor.ndim and tensor.dtype == kind and random.random() < 0.5:
            tensor.reshape(-1)[0] = 0.0
    tensors["head.bias"][-1] = -0.0
    return tensors


def surviving(random: np.random.Generator, length: int) -> np.ndarray | None:
    if random.random() < 0.25:
        return None
    count = int(random.integers(1, length + 1))
    return np.sort(random.choice(length, count, replace=False)).astype(np.int32)


def with_factors(random: np.random.Generator, mapping: IndexMap) -> IndexMap:
    """The map of a compensated submodel: a gate for each surviving channel, often 1, that multiplies the next layer's
    input channels; and, as nowhere else all axes have factors, gates of the rows of the second convolution."""

    def gates(count: int) -> np.ndarray:
        drawn = np.exp2(random.uniform(-2, 2, count)) * (random.random(count) < 0.7)
        return np.where(drawn == 0, 1, drawn).astype(np.float32)

    tensors = dict(mapping.tensors)
    for name, axes in (("conv2.weight", (0, 1)), ("head.weight", (1,))):
        entry = tensors[name]
        factors = [gates(length) if axis in axes else None for axis, length in enumerate(entry.submodel_shape)]
        tensors[name] = TensorMap(entry.shape, entry.dtype, entry.axes, tuple(factors))
    return IndexMap(mapping.checkpoint, tensors)


def index_map(random: np.random.Generator, tensors: dict[str, np.ndarray], full: bool = False) -> IndexMap:
    widths = {0: None} | {
        layer: None if full else surviving(random, len(tensors[f"bn{layer}.weight"])) for layer in (1, 2)
    }
    maps = {}
    for name, tensor in tensors.items():
        axes: list[np.ndarray | None] = [None] * tensor.ndim
        if name[:4] == "conv":
            axes[0], axes[1] = widths[int(name[4])], widths[int(name[4]) - 1]
        elif name[:2] == "bn" and tensor.ndim:
            axes[0] = widths[int(name[2])]
        elif name == "head.weight":
            axes[1] = widths[2]
        maps[name] = TensorMap(tensor.shape, dtype_code(tensor.dtype), tuple(axes))
    return IndexMap(arrays_digest(tensors), maps)


def cut(tensors: dict[str, np.ndarray], mapping: IndexMap) -> dict[str, np.ndarray]:
    return {name: gather(tensors[name], entry) for name, entry in mapping.tensors.items()}


def perturb(random: np.random.Generator, tensors: dict[str, np.ndarray], moved: float = 1.0) -> dict[str, np.ndarray]:
    """What training may do: other floats in a share `moved` of the entries, positive variances, higher counters."""
    result = {}
    for name, tensor in tensors.items():
        if tensor.dtype == np.int64:
            result[name] = tensor + random.integers(0, 50)
        else:
            new = tensor.astype(np.float64) * random.normal(1, 0.5, tensor.shape) + random.normal(0, 0.1, tensor.shape)
            new = np.asarray(np.abs(new) if name.endswith("running_var") else new).astype(tensor.dtype)
            result[name] = new if moved == 1 else np.where(random.random(tensor.shape) < moved, new, tensor)
    return result


def save_global(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_arrays(
        path,
        tensors,
        dump_metadata(CheckpointMetadata(model=MODEL, input_shape=(3, 8, 8), classes=4, provenance=PROVENANCE)),
    )
    return path


def save_client(
    folder: Path,
    tensors: dict[str, np.ndarray],
    mapping: IndexMap,
    num_examples: int | None = 10,
    digest: str | None = None,
) -> Path:
    folder.mkdir(exist_ok=True)
    write_index_map(folder / "index_map.safetensors", mapping, PROVENANCE)
    metadata = SubmodelMetadata(
        model=MODEL,
        input_shape=(3, 8, 8),
        classes=4,
        checkpoint=digest or mapping.checkpoint,
        num_examples=num_examples,
        provenance=PROVENANCE,
    )
    save_arrays(folder / "submodel.safetensors", tensors, dump_metadata(metadata))
    return folder


@dataclass(frozen=True)
class Fleet:
    checkpoint: Path
    tensors: dict[str, np.ndarray]
    folders: list[Path]
    maps: list[IndexMap]
    submodels: list[dict[str, np.ndarray]]
    examples: list[int]


def fleet(
    folder: Path,
    seed: int,
    clients: int,
    dtype: str = "F32",
    trained: bool = True,
    full: bool = False,
    widths=(3, 6, 5),
    compensated: bool = False,
    moved: float = 1.0,
) -> Fleet:
    random = np.random.default_rng(seed)
    tensors = network(random, dtype, widths)
    checkpoint = save_global(folder / "global.safetensors", tensors)
    folders, maps, submodels, examples = [], [], [], []
    for number in range(clients):
        mapping = index_map(random, tensors, full)
        if compensated:
            mapping = with_factors(random, mapping)
        submodel = cut(tensors, mapping)
        if trained:
            submodel = perturb(random, submodel, moved)
        maps.append(mapping)
        submodels.append(submodel)
        examples.append(int(random.integers(1, 5000)))
        folders.append(save_client(folder / f"client{number}", submodel, mapping, examples[-1]))
    return Fleet(checkpoint, tensors, folders, maps, submodels, examples)


def merge(it: Fleet, rule: str = "fill", **options):
    output = it.checkpoint.parent / "merged.safetensors"
    report = reconstruct(
        it.checkpoint,
        options.pop("folders", it.folders),
        output,
        rule=rule,
        force=True,
        provenance=PROVENANCE,
        **options,
    )
    return load(output), report


def places(entry: TensorMap) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All (submodel coordinate, global coordinate) pairs of a map, by plain enumeration."""
    lists = [range(n) if a is None else a.tolist() for a, n in zip(entry.axes, entry.shape, strict=True)]
    inner = itertools.product(*(range(len(items)) for items in lists))
    return list(zip(inner, itertools.product(*lists), strict=True))


def oracle(it: Fleet, rule: str, name: str) -> np.ndarray:
    """One coordinate at a time, in float64, straight from the formulas of METHOD.md section 6."""
    old = it.tensors[name].astype(np.float64)
    partner = name.replace("running_var", "running_mean")
    contributions: dict[tuple[int, ...], list[tuple[float, float, float]]] = {}
    for mapping, submodel, examples in zip(it.maps, it.submodels, it.examples, strict=True):
        for inside, outside in places(mapping.tensors[name]):
            mu = float(submodel[partner][inside])
            contributions.setdefault(outside, []).append((examples, float(submodel[name][inside]), mu))
    merged = old.copy()
    for place, entries in contributions.items():
        rest = sum(it.examples) - sum(n for n, _, _ in entries)
        if rule == "fill" and rest:
            entries = [*entries, (rest, float(old[place]), float(it.tensors[partner][place]))]
        total = sum(n for n, _, _ in entries)
        mean = sum(n * value for n, value, _ in entries) / total
        if name.endswith("running_var"):
            center = sum(n * mu for n, _, mu in entries) / total
            mean += sum(n * (mu - center) ** 2 for n, _, mu in entries) / total
        merged[place] = mean
    return merged


def curvature(folder: Path, submodel: dict[str, np.ndarray], make) -> dict[str, np.ndarray]:
    """Write what `make` says of each weight as the client's curvature."""
    made = {
        name: np.asarray(make(name, tensor), np.float32)
        for name, tensor in submodel.items()
        if tensor.dtype != np.int64 and "running" not in name
    }
    with open_safetensors(folder / "index_map.safetensors") as file:
        digest = read_metadata(file, IndexMapMetadata).checkpoint
    save_arrays(folder / "curvature.safetensors", made, curvature_metadata(digest))
    return made


def curvature_metadata(digest: str) -> dict[str, str]:
    return dump_metadata(CurvatureMetadata(checkpoint=digest, samples=8, provenance=PROVENANCE))
