"""A network as an ONNX file with a free batch axis, kept only if it computes what the network does."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cahfp_cli.errors import VerificationError, first_line
from cahfp_cli.export.opset import DEFAULT_OPSET, at_opset, lowest_ir
from cahfp_cli.export.outputs import NamedOutputs, left_out, named_outputs
from cahfp_cli.export.refusals import plain
from cahfp_cli.export.side_file import LARGEST, move_weights, remove, size_of_file

PARITY_BATCHES = (1, 5)
PARITY_TOLERANCE = 1e-4
INPUT_NAME = "input"
WITHOUT = "go without the file: --no-onnx"
RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
Samples = npt.NDArray[Any]


@dataclass(frozen=True)
class Exported:
    """size: bytes of the file, and of the one beside it if there is one. parity: largest difference to torch over
    `PARITY_BATCHES` and all outputs, relative to an output's largest absolute value where that is above 1. outputs:
    their names. left_out: names of what the network returns besides and no file can hold."""

    size: int
    parity: float
    outputs: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class ExportOptions:
    """samples: (n, *input_shape), real inputs to compare on; without, random ones. seed: of which samples, or of the
    random ones. opset: 13 to 20. largest: bytes of weights above which they go into a file beside it, as its format
    demands above 2 GiB."""

    samples: Samples | None = None
    seed: int = 0
    opset: int = DEFAULT_OPSET
    largest: int = LARGEST


DEFAULTS = ExportOptions()


def export_onnx(
    model: nn.Module,
    input_shape: tuple[int, ...],
    path: Path,
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype = torch.float32,
    options: ExportOptions = DEFAULTS,
) -> Exported:
    """Write a network in evaluation mode as ONNX and compare it with torch in ONNX Runtime.

    Every tensor of its output becomes an output of the file, see outputs.py.

    Args:
        model: on the CPU; left as it is.
        input_shape: of one sample.
        path: written as it is (see checkpoint/atomic.py for safety); removed again if the comparison fails.
        metadata: becomes the file's `metadata_props`.
        dtype: of the input where there are no samples.
    Raises:
        VerificationError: the exporter refuses the network, the opset does not have its operators, or the file's
            results differ by more than 1e-4.
    """
    network = model.eval()
    draw = Draw(input_shape, options.seed, dtype, options.samples)
    program, names, unnamed = captured(network, draw(2))
    if not batch_is_free(program):
        raise VerificationError(
            "the network's code fixes the batch size, so it cannot be exported for any batch.\n"
            f"Where it says len(x), x.shape[0] leaves it open; or {WITHOUT}."
        )
    try:
        move_weights(program.model, path, options.largest)
        proto = cleaned(at_opset(program.model_proto, options.opset), metadata)
        path.write_bytes(proto.SerializeToString(deterministic=True))
        del proto, program
        parity = checked_parity(network, path, names, draw)
    except BaseException:
        remove(path)
        raise
    return Exported(size_of_file(path), parity, names, unnamed)


def captured(
    network: nn.Module, sample: torch.Tensor
) -> tuple[torch.onnx.ONNXProgram, tuple[str, ...], tuple[str, ...]]:
    """The network as a program of ONNX, the names of its outputs, and of what it returns besides.

    Raises: VerificationError: the exporter refuses it.
    """
    try:
        with torch.no_grad():
            output = network(sample)
        names, unnamed = tuple(named_outputs(output)), tuple(left_out(output))
        direct = isinstance(output, torch.Tensor) and not output.is_complex() and output is not sample
        # Fused attention promises a memory layout that the exporter's own decomposition of it does not keep.
        with quiet(), sdpa_kernel(SDPBackend.MATH):
            source = network if direct and names_are_free(network, names) else NamedOutputs(network)
            return to_onnx(source.eval(), sample, names), names, unnamed
    except Exception as error:  # the exporter raises errors of many kinds for what it cannot express
        raise VerificationError(
            f"the network cannot be exported to ONNX: {plain(error).rstrip('.')}; {WITHOUT}"
        ) from error


def names_are_free(network: nn.Module, outputs: tuple[str, ...]) -> bool:
    """Whether the network's own names mean nothing else: tensors are called by theirs in the file, beside its input
    and outputs, and while it is made the network becomes an object that has attributes of its own, such as `code`."""
    own = {name for name, _ in network.named_children()}
    tensors = {*dict(network.named_parameters(recurse=False)), *dict(network.named_buffers(recurse=False))}
    reserved = set(dir(torch.fx.GraphModule(nn.Module(), torch.fx.Graph()))) - set(dir(nn.Module()))
    return not ((own | tensors) & reserved or tensors & {INPUT_NAME, *outputs})


def to_onnx(network: nn.Module, sample: torch.Tensor, outputs: tuple[str, ...]) -> torch.onnx.ONNXProgram:
    """Export with a free batch axis: by running the network, or, where `len(x)` or the like then fixes the batch, by
    analysing its code. Operators that the exporter does not know are tried in other words (see substitutes.py)."""
    from cahfp_cli.export.substitutes import SUBSTITUTES

    shapes = ({0: torch.export.Dim("batch", min=1)},)

    def convert(source: nn.Module | torch.export.ExportedProgram, inputs: tuple[torch.Tensor, ...], more: Any) -> Any:
        return torch.onnx.export(
            source,
            inputs,
            dynamo=True,
            opset_version=DEFAULT_OPSET,
            input_names=[INPUT_NAME],
            output_names=list(outputs),
            dynamic_shapes=shapes,
            verbose=False,
            custom_translation_table=more,
        )

    try:
        table = None
        program: torch.onnx.ONNXProgram = convert(network, (sample,), table)
    except Exception:  # of many kinds; what it still does not know is refused the second time
        table = SUBSTITUTES
        program = convert(network, (sample,), table)
    if not batch_is_free(program):
        with suppress(Exception):  # code that it cannot analyse, as a rewritten module's, leaves the batch fixed
            program = convert(torch.export.export(network, (sample,), dynamic_shapes=shapes, strict=True), (), table)
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
    proto.ir_version = lowest_ir(proto)
    for key in sorted(metadata):
        proto.metadata_props.add(key=key, value=metadata[key])
    return proto


def checked_parity(network: nn.Module, path: Path, names: tuple[str, ...], draw: "Draw") -> float:
    """As `measure_parity`. Raises: VerificationError: the file does not run, or it differs."""
    try:
        parity, worst = measure_parity(network, path, names, draw)
    except VerificationError:
        raise
    except Exception as error:  # ONNX Runtime's own errors have no common class
        raise VerificationError(f"the ONNX file does not run in ONNX Runtime: {first_line(error)}") from error
    if not parity <= PARITY_TOLERANCE:
        where = f" in the output {worst}" if len(names) > 1 else ""
        kinds = sorted({node.op_type for node in onnx.load(path, load_external_data=False).graph.node} & RANDOM)
        why = f", which draws random numbers ({', '.join(kinds)})," if kinds else ""
        raise VerificationError(
            f"the ONNX file differs from the network{why} by {parity:.2e}{where}, more than "
            f"{PARITY_TOLERANCE:.0e}: not kept; {WITHOUT}"
        )
    return parity


def measure_parity(network: nn.Module, path: Path, names: tuple[str, ...], draw: "Draw") -> tuple[float, str]:
    """Largest difference between the file in ONNX Runtime and the network, see `Exported.parity`, and its output.

    Where the network gives NaN or infinity the file must too.
    Raises: VerificationError: a shape differs, or the network gives no finite number, so that nothing is compared.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    differences = dict.fromkeys(names, 0.0)
    finite = dict.fromkeys(names, False)
    for batch in PARITY_BATCHES:
        sample = draw(batch)
        with torch.no_grad():
            output = named_outputs(network(sample))
        found = session.run(list(names), {INPUT_NAME: sample.numpy()})
        for name, ours in zip(names, found, strict=True):
            expected = output[name].detach().numpy()
            if ours.shape != expected.shape:
                raise VerificationError(f"the ONNX file gives shape {ours.shape} instead of {expected.shape}")
            finite[name] |= bool(np.isfinite(expected).any()) or expected.size == 0
            differences[name] = float(np.fmax(differences[name], difference(ours, expected)))
    unseen = [name for name in names if not finite[name]]
    if unseen:
        raise VerificationError(
            f"the network gives no finite number in {', '.join(unseen)}, so its ONNX file cannot be compared with it.\n"
            f"Pass real samples (--calibration or --data), or {WITHOUT}."
        )
    worst = max(names, key=lambda name: differences[name])
    return differences[worst], worst


def difference(found: Samples, expected: Samples) -> float:
    """Largest difference of two arrays of one shape, relative to the largest absolute expected value where that is
    above 1; infinite where one is finite and the other is not, or they are integers and differ."""
    if expected.dtype.kind not in "fc":
        return 0.0 if np.array_equal(found, expected) else np.inf
    both = np.isfinite(expected) & np.isfinite(found)
    same = both | (found == expected) | (np.isnan(found) & np.isnan(expected))
    if not same.all():
        return np.inf
    if not both.any():
        return 0.0
    return float(np.abs(found[both] - expected[both]).max()) / max(1.0, float(np.abs(expected[both]).max()))


@dataclass(frozen=True)
class Draw:
    """Samples to export and compare on: some of the real ones where there are any, else random ones."""

    input_shape: tuple[int, ...]
    seed: int
    dtype: torch.dtype
    samples: Samples | None

    def __call__(self, batch: int) -> torch.Tensor:
        """`batch` of them, others for another batch."""
        if self.samples is None or len(self.samples) == 0:
            return random_samples(batch, self.input_shape, self.seed + batch, self.dtype)
        rows = np.random.default_rng((self.seed, batch)).integers(len(self.samples), size=batch)
        return torch.from_numpy(np.ascontiguousarray(self.samples[rows]))


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
