"""Good files made bad in one way each, with the safetensors library and NumPy rather than with our own code."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

Tensors = dict[str, np.ndarray]
WEIGHT = "layer2.1.conv1.weight"


def rewritten(source: Path, target: Path, change: Callable[[Tensors, dict[str, Any]], None]) -> Path:
    """A copy of a safetensors file whose tensors and `cahfp` record `change` has edited in place."""
    tensors = load_file(source)
    with safe_open(source, framework="numpy") as file:
        metadata = dict(file.metadata())
    record = json.loads(metadata["cahfp"])
    change(tensors, record)
    save_file(tensors, target, {**metadata, "cahfp": json.dumps(record)})
    return target


def with_value(value: float) -> Callable[[Path, Path], Path]:
    """Puts `value` into one weight."""

    def change(tensors: Tensors, record: dict[str, Any]) -> None:
        tensors[WEIGHT].reshape(-1)[3] = value

    return lambda source, target: rewritten(source, target, change)


def without_tensor(source: Path, target: Path) -> Path:
    def change(tensors: Tensors, record: dict[str, Any]) -> None:
        del tensors[WEIGHT]

    return rewritten(source, target, change)


def reshaped(source: Path, target: Path) -> Path:
    return rewritten(source, target, lambda tensors, record: tensors.update({WEIGHT: tensors[WEIGHT][:-1].copy()}))


def truncated(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes()[:-1000])
    return target


def lying(source: Path, target: Path) -> Path:
    """Two tensors that claim the same bytes."""
    content = source.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header[WEIGHT]["data_offsets"] = [offset - 16 for offset in header[WEIGHT]["data_offsets"]]
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return target


class Trap:
    """Its pickle makes a folder when it is read by a reader that trusts it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        import os

        return os.mkdir, (str(self.marker),)


def pickled(target: Path, marker: Path) -> Path:
    """A plain pickle with a trap."""
    target.write_bytes(pickle.dumps({"weight": Trap(marker)}, protocol=2))
    return target


def torch_archive(target: Path, marker: Path) -> Path:
    """What torch.save writes, with a trap among the weights."""
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": Trap(marker)}, protocol=2))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return target


def npz(target: Path, shape: tuple[int, ...] = (1, 8, 8), classes: int = 10, samples: int = 20) -> Path:
    random = np.random.default_rng(0)
    labels = np.arange(samples) % classes
    np.savez(target, x=random.random((samples, *shape)).astype(np.float32), y=labels, classes=classes)
    return target


def trapped_npz(target: Path, marker: Path) -> Path:
    """An archive whose labels are a pickle with a trap."""
    objects = np.array([Trap(marker)] * 4, dtype=object)
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros((4, 1, 8, 8), np.float32), y=objects, allow_pickle=True)
    target.write_bytes(buffer.getvalue())
    return target
