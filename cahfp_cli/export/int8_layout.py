"""How int8 numbers are laid out for the processor that will multiply them.

ONNX Runtime's own advice (the docstring of `onnxruntime.quantization.quantize_static`): unsigned activations on x86,
signed ones on Arm, signed ones around zero on GPUs. x86 without VNNI adds pairs of products in 16 bits, which can
overflow unless the weights keep to 7 bits (`reduce_range`).
"""

from dataclasses import dataclass
from typing import Literal

from cahfp_cli.running.processor import has_vnni, is_x86

GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


@dataclass(frozen=True)
class Int8Layout:
    """activations: their type. symmetric: zero is stored as 0. reduce_range: weights use 7 of their 8 bits."""

    activations: Literal["uint8", "int8"]
    symmetric: bool = False
    reduce_range: bool = False


def layout_for(architecture: str | None, provider: str | None) -> Int8Layout:
    """The layout for a device whose profile gives `compute.int8`: all 8 bits, for which that promises dot products.
    Unsigned on the architecture `x86`; signed elsewhere, around zero where a GPU is the provider.
    """
    if architecture == "x86":
        return Int8Layout("uint8")
    return Int8Layout("int8", symmetric=provider in GPU_PROVIDERS)


def layout_of_machine() -> Int8Layout:
    """The layout for the CPU that this runs on."""
    return Int8Layout("uint8", reduce_range=not has_vnni()) if is_x86() else Int8Layout("int8")
