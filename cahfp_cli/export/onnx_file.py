"""A network as one self-contained ONNX file with a free batch axis, kept only if it computes what the network does."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cahfp_cli.errors import VerificationError, first_line
from cahfp_cli.models.outputs import logits_of

OPSET = 18
PARITY_BATCHES = (1, 5)
PARITY_TOLERANCE = 1e-4
INPUT_NAME = "input"
OUTPUT_NAME = "logits"


@dataclass(frozen=True)
class Exported:
    """size: bytes of the file. parity: largest difference to torch over `PARITY_BATCHES`, relative to the largest
    absolute logit where that is above 1."""

    size: int
    parity: float


class Logits(nn.Module):
    """A network whose output is only the tensor of logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return logits_of(self.network(x))


def export_onnx(
    model: nn.Module,
    input_shape: tuple[int, ...],
    path: Path,
    metadata: Mapping[str, str],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Exported:
    """Write a network in evaluation mode as ONNX and compare it with torch in ONNX Runtime.

    Args:
        model: on the CPU; left as it is.
        input_shape: of one sample.
        path: written as it is (see checkpoint/atomic.py for safety); removed again if the comparison fails.
        metadata: becomes the file's `metadata_props`.
        seed: of the random samples that are compared.
    Raises:
        VerificationError: the exporter refuses the network, or the file's results differ by more than 1e-4.
    """
    network = model.eval()
    sample = random_samples(2, input_shape, seed, dtype)
    try:
        with torch.no_grad():
            plain = isinstance(network(sample), torch.Tensor)
        # Fused attention promises a memory layout that the exporter's own decomposition of it does not keep.
        with quiet(), sdpa_kernel(SDPBackend.MATH):
            program = to_onnx(network if plain else Logits(network), sample)
    except Exception as error:  # the exporter raises errors of many kinds for what it cannot express
        raise VerificationError(f"the network cannot be exported to ONNX: {first_line(error)}") from error
    if not batch_is_free(program):
        raise VerificationError(
            "the network's code fixes the batch size, so it cannot be exported for any batch.\n"
            "Where it says len(x), x.shape[0] leaves it open; or go without the file: --no-onnx."
        )
    proto = cleaned(program.model_proto, metadata)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    try:
        try:
            parity = measure_parity(network, path, input_shape, seed, dtype)
        except VerificationError:
            raise
        except Exception as error:  # ONNX Runtime's own errors have no common class
            raise VerificationError(f"the ONNX file does not run in ONNX Runtime: {first_line(error)}") from error
        if not parity <= PARITY_TOLERANCE:
            raise VerificationError(
                f"the ONNX file differs from the network by {parity:.2e}, more than {PARITY_TOLERANCE:.0e}: not kept"
            )
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Exported(path.stat().st_size, parity)


def to_onnx(network: nn.Module, sample: torch.Tensor) -> torch.onnx.ONNXProgram:
    """Export with a free batch axis: by running the network, or, where `len(x)` or the like then fixes the batch, by
    analysing its code."""
    shapes = ({0: torch.export.Dim("batch", min=1)},)

    def convert(source: nn.Module | torch.export.ExportedProgram, inputs: tuple[torch.Tensor, ...]) -> Any:
        return torch.onnx.export(
            source,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=shapes,
            verbose=False,
        )

    program: torch.onnx.ONNXProgram = convert(network, (sample,))
    if not batch_is_free(program):
        with suppress(Exception):  # code that it cannot analyse, as a rewritten module's, leaves the batch fixed
            program = convert(torch.export.export(network, (sample,), dynamic_shapes=shapes, strict=True), ())
    return program


def batch_is_free(program: torch.onnx.ONNXProgram) -> bool:
    """Whether the exporter left the batch open; it may fix it without a word."""
    return all(not isinstance(value.shape[0], int) for value in program.model.graph.inputs if value.shape)


def cleaned(proto: onnx.ModelProto, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """Without what the exporter says about the machine it ran on (source paths, stack traces), with our metadata."""
    graphs = [proto.graph, *proto.functions]
    proto.doc_string = ""
    del proto.metadata_props[:]
    for graph in graphs:
        graph.doc_string = ""
        if hasattr(graph, "metadata_props"):
            del graph.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
    for described in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        described.doc_string = ""
        del described.metadata_props[:]
    for key in sorted(metadata):
        proto.metadata_props.add(key=key, value=metadata[key])
    return proto


def measure_parity(
    network: nn.Module, path: Path, input_shape: tuple[int, ...], seed: int, dtype: torch.dtype
) -> float:
    """Largest difference between the file in ONNX Runtime and the network, see `Exported.parity`; NaN counts."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in PARITY_BATCHES:
        sample = random_samples(batch, input_shape, seed + batch, dtype)
        with torch.no_grad():
            expected = logits_of(network(sample)).numpy()
        found = session.run([OUTPUT_NAME], {INPUT_NAME: sample.numpy()})[0]
        if found.shape != expected.shape:
            raise VerificationError(f"the ONNX file gives shape {found.shape} instead of {expected.shape}")
        scale = max(1.0, float(np.abs(expected).max()))
        worst = float(np.fmax(worst, np.abs(found - expected).max() / scale)) if np.isfinite(found).all() else np.inf
    return worst


def random_samples(batch: int, input_shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Uniform in 0..1, as images are; for integer inputs 0 or 1, which every vocabulary has."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.rand((batch, *input_shape), generator=generator)
    return samples.to(dtype) if dtype.is_floating_point else (samples > 0.5).to(dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter prints to standard output, which belongs to results, and warns about its own internals."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
