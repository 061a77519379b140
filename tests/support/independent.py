"""What a submodel folder must be, told from its files alone: safetensors, NumPy, plain torch and ONNX Runtime.

Nothing here is the product's: a fault that it shares with its own checks would otherwise pass them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Axes:
    """A tensor's entry in an index map. indices: per axis what survives, or None for all; factors: per axis what each
    surviving slice was multiplied with, or None."""

    shape: tuple[int, ...]
    indices: tuple[np.ndarray | None, ...]
    factors: tuple[np.ndarray | None, ...]

    def whole(self) -> tuple[np.ndarray, ...]:
        """Per axis the surviving indices, spelt out."""
        pairs = zip(self.indices, self.shape, strict=True)
        return tuple(np.arange(length) if index is None else index for index, length in pairs)

    def factor(self) -> torch.Tensor:
        """The factor of every surviving entry, float32 of the submodel's shape or broadcast to it."""
        product = np.ones([1] * len(self.shape), np.float64)
        for axis, factors in enumerate(self.factors):
            if factors is not None:
                product = product * factors.astype(np.float64).reshape(
                    [-1 if a == axis else 1 for a in range(len(self.shape))]
                )
        return torch.from_numpy(product.astype(np.float32))


def index_map(folder: Path) -> dict[str, Axes]:
    """The index map of a submodel folder: parameters and buffers, those that no checkpoint holds among them."""
    with safe_open(folder / "index_map.safetensors", "np") as file:
        table = json.loads(file.metadata()["cahfp"])
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)

    def named(kind: str, numbers: list[int | None]) -> tuple[np.ndarray | None, ...]:
        return tuple(None if number is None else arrays[f"{kind}.{number}"] for number in numbers)

    return {
        name: Axes(tuple(entry["shape"]), named("index", entry["axes"]), named("factor", entry.get("factors", [])))
        for name, entry in {**table["tensors"], **table.get("buffers", {})}.items()
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def gathered(whole: torch.Tensor, axes: Axes) -> torch.Tensor:
    """What docs/reference/files.md says that the submodel holds of a tensor."""
    for axis, index in enumerate(axes.indices):
        if index is not None:
            whole = whole.index_select(axis, torch.from_numpy(index.astype(np.int64)))
    if not any(factors is not None for factors in axes.factors):
        return whole
    wide = torch.float64 if whole.dtype == torch.float64 else torch.float32
    return (whole.to(wide) * axes.factor().to(wide)).to(whole.dtype)


def faults_of_map(checkpoint: Tensors, folder: Path) -> list[str]:
    """How an untrained submodel differs from what NumPy gathers from the checkpoint."""
    compact, found = load_file(folder / "submodel.safetensors"), []
    table = {name: axes for name, axes in index_map(folder).items() if name in checkpoint or name in compact}
    if not compact.keys() == table.keys() == checkpoint.keys():
        return [f"tensor names differ: {sorted({*compact, *table} ^ {*checkpoint})[:3]}"]
    for name, axes in table.items():
        if axes.shape != tuple(checkpoint[name].shape):
            found.append(f"{name}: the map says {axes.shape}, the checkpoint has {tuple(checkpoint[name].shape)}")
            continue
        for index, length in zip(axes.whole(), axes.shape, strict=True):
            if len(index) and not (index[0] >= 0 and index[-1] < length and (np.diff(index) > 0).all()):
                found.append(f"{name}: indices that do not increase within {length}")
        expected = gathered(checkpoint[name], axes)
        if expected.dtype != compact[name].dtype or bits(expected) != bits(compact[name]):
            found.append(f"{name}: not the checkpoint's entries")
    return found


def differing(first: Tensors, second: Tensors) -> list[str]:
    """The tensors that two files do not share bit for bit."""
    names = sorted({*first, *second})
    return [
        name
        for name in names
        if name not in first
        or name not in second
        or first[name].dtype != second[name].dtype
        or first[name].shape != second[name].shape
        or bits(first[name]) != bits(second[name])
    ]


def masked(model: nn.Module, checkpoint: Tensors, folder: Path) -> nn.Module:
    """`model` with the checkpoint's weights, those that the submodel lacks zero, and those that compensate scaled.

    A removed channel's variance stays: a normalisation divides by it, and what it gives is multiplied by zero.
    """
    state = model.state_dict()  # which notes versions beside its tensors
    for name in set(state) - set(checkpoint):
        del state[name]
    state.update(checkpoint)
    _, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    done: set[int] = set()
    with torch.no_grad():
        for name, axes in index_map(folder).items():
            tensor = named.get(name)
            if tensor is None or name.endswith("running_var") or tensor.data_ptr() in done:
                continue
            done.add(tensor.data_ptr())
            for axis, index in enumerate(axes.indices):
                if index is not None:
                    gone = np.setdiff1d(np.arange(axes.shape[axis]), index)
                    tensor.index_fill_(axis, torch.from_numpy(gone.astype(np.int64)), 0)
            for axis, factors in enumerate(axes.factors):
                if factors is not None:
                    every = torch.ones(axes.shape[axis])
                    every[torch.from_numpy(axes.whole()[axis].astype(np.int64))] = torch.from_numpy(factors)
                    tensor.mul_(every.to(tensor.dtype).reshape([-1 if a == axis else 1 for a in range(tensor.dim())]))
    return model.eval()


def leaves(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in what a network returns, in its order."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from leaves(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from leaves(value)
    elif hasattr(output, "logits"):
        yield output.logits


def faults_of_onnx(
    path: Path, network: nn.Module, samples: Callable[[int], torch.Tensor], tolerance: float = 1e-4
) -> list[str]:
    """How an ONNX file's outputs differ from a network's, at three batch sizes, relative to the largest of them."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        x = samples(batch)
        with torch.no_grad():
            expected = list(leaves(network(x.clone())))
        found = session.run(None, {"input": x.numpy()})
        if len(found) != len(expected):
            return [f"the ONNX file has {len(found)} outputs, the network {len(expected)}"]
        for number, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
            if theirs.shape != tuple(ours.shape):
                return [f"output {number} of a batch of {batch} is {theirs.shape}, not {tuple(ours.shape)}"]
            wide = ours.double().numpy()
            difference = np.abs(theirs.astype(np.float64) - wide).max(initial=0) / max(1.0, np.abs(wide).max(initial=0))
            if not difference <= tolerance:
                return [f"output {number} of a batch of {batch} differs by {difference:.1e}"]
    return []
