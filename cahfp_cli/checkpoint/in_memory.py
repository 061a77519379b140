"""Tensors in memory, to be read as those of a safetensors file are."""

from collections.abc import Mapping
from pathlib import Path

from cahfp_cli.checkpoint.dtypes import Array, dtype_code
from cahfp_cli.checkpoint.safetensors_file import TensorInfo
from cahfp_cli.checkpoint.writer import TensorSpec, layout


class TensorsInMemory:
    """The file that `save_arrays` would make of these arrays, without the file: the same places, the same header.

    path: what they go by in messages. `arrays` are read, never changed, and not copied.
    Raises: ValueError: a dtype that safetensors files of ours do not hold.
    """

    def __init__(self, path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
        self.path, self.metadata = path, metadata
        specs = [TensorSpec(name, dtype_code(array.dtype), array.shape) for name, array in arrays.items()]
        ordered, self._header = layout(specs, metadata)
        self._arrays = {spec.name: arrays[spec.name] for spec in ordered}
        self.tensors: dict[str, TensorInfo] = {}
        start = len(self._header)
        for spec in ordered:
            self.tensors[spec.name] = TensorInfo(spec.name, spec.dtype, spec.shape, start, start + spec.nbytes)
            start += spec.nbytes

    def read_rows(self, name: str, first: int, last: int) -> Array:
        """As `SafetensorsFile.read_rows`, but a view."""
        array = self._arrays[name]
        return array[first:last] if array.ndim else array

    def read_header(self) -> bytes:
        """As `SafetensorsFile.read_header`."""
        return self._header
