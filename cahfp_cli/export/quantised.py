"""Smaller ONNX files made from the fp32 one, fp16 or int8, kept only if they classify as it does.

int8 is ONNX Runtime's static quantisation: weights in int8 with a scale for each output channel, activations in 8 bits
with ranges seen on calibration samples, both written as QuantizeLinear and DequantizeLinear nodes (QDQ). fp16 is its
converter, with inputs and outputs left in float32.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from cahfp_cli.data.batches import batches
from cahfp_cli.data.dataset import Dataset, Samples
from cahfp_cli.errors import InputError, VerificationError, first_line
from cahfp_cli.export.int8_layout import Int8Layout
from cahfp_cli.export.onnx_file import INPUT_NAME, cleaned, quiet
from cahfp_cli.export.refusals import plain
from cahfp_cli.export.side_file import LARGEST, side_files
from cahfp_cli.running import onnx_session

Dtype = Literal["fp16", "int8"]
AGREEMENT_FLOOR: dict[Dtype, float] = {"fp16": 0.98, "int8": 0.9}
"""Share of samples that a file must put in the class that the fp32 file does."""
CALIBRATION_BATCHES = 16
CALIBRATION_SAMPLES = 1024
COMPARED_AT_ONCE = 256
FP16_LARGEST = float(np.finfo(np.float16).max)
PRODUCTS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Quantisation:
    """What to make of an fp32 file, and on what to check it.

    dtype: of the file. calibration: (n, ...), of which the first 1,024 set the ranges. compared: samples on which the
    two files are compared; labelled: whether their labels are the true ones. layout: how int8 is laid out.
    """

    dtype: Dtype
    calibration: Samples
    compared: Dataset
    labelled: bool
    layout: Int8Layout


@dataclass(frozen=True)
class Comparison:
    """A file beside the fp32 one, over `samples`.

    agreement: share of the samples that both put in the same class. difference: largest difference of a logit,
    relative to the largest absolute fp32 logit where that is above 1. accuracy, fp32_accuracy: None without labels.
    """

    samples: int
    agreement: float
    difference: float
    accuracy: float | None
    fp32_accuracy: float | None


@dataclass(frozen=True)
class Quantised:
    """size: bytes of the file."""

    size: int
    comparison: Comparison


def export_quantised(source: Path, path: Path, wanted: Quantisation) -> Quantised:
    """Write the fp16 or int8 version of an ONNX file that we exported, and compare the two in ONNX Runtime.

    The same inputs give the same bytes. The opset, the free batch axis and the metadata stay; `cahfp.dtype` is added.

    Args:
        source: the fp32 file; left as it is.
        path: written as it is (see checkpoint/atomic.py for safety); removed again if the comparison fails.
    Raises:
        VerificationError: the network cannot be converted, its activations leave the range of fp16, or the file gives
            NaN or Inf or agrees with the fp32 file on less than `AGREEMENT_FLOOR`.
    """
    try:
        with quiet(), tempfile.TemporaryDirectory(prefix="cahfp.") as folder:
            if wanted.dtype == "int8":
                proto = to_int8(source, Path(folder), wanted.calibration, wanted.layout)
            else:
                check_fp16_range(source, Path(folder), wanted.calibration)
                proto = to_fp16(source)
    except VerificationError:
        raise
    except Exception as error:  # the converters and ONNX Runtime raise errors of many kinds
        reason = plain(error).rstrip(".")
        raise VerificationError(
            f"the network cannot be converted to {wanted.dtype}: {reason}; leave out --dtype {wanted.dtype}"
        ) from error
    original = onnx.load(source)
    drop_unused_domains(proto, original)
    metadata = {entry.key: entry.value for entry in original.metadata_props}
    proto = cleaned(proto, {**metadata, "cahfp.dtype": wanted.dtype})
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > LARGEST:
        raise VerificationError(f"the {wanted.dtype} file would have 2 GiB or more: leave out --dtype {wanted.dtype}")
    path.write_bytes(proto.SerializeToString(deterministic=True))
    try:
        comparison = compare(source, path, wanted)
        check_agreement(comparison, wanted.dtype)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Quantised(path.stat().st_size, comparison)


def to_int8(source: Path, folder: Path, calibration: Samples, layout: Int8Layout) -> onnx.ModelProto:
    """Static quantisation; `folder` takes the files in between.

    Beside layer norms only products are quantised: the other operators of a transformer lose more time and accuracy by
    going to 8 bits and back than they win.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    prepared, written = prepared_file(source, folder), folder / "int8.onnx"
    normalised = has_layer_norms(onnx.load(prepared))
    quantize_static(
        str(prepared),
        str(written),
        CalibrationReader(calibration),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(PRODUCTS) if normalised else None,
        per_channel=True,
        reduce_range=layout.reduce_range,
        activation_type=QuantType.QUInt8 if layout.activations == "uint8" else QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={"ActivationSymmetric": layout.symmetric, "MatMulConstBOnly": normalised},
    )
    return onnx.load(written)


def prepared_file(source: Path, folder: Path) -> Path:
    """The file with the shapes of its values written in and its constants computed, as far as ONNX Runtime can: that
    makes a better int8 file, and none of it is needed."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    for number, skipped in enumerate(({}, {"skip_symbolic_shape": True})):
        with suppress(Exception):  # of many kinds, for operators whose shapes it cannot infer
            quant_pre_process(str(source), str(folder / f"prepared.{number}.onnx"), **skipped)
            return folder / f"prepared.{number}.onnx"
    return source


def has_layer_norms(proto: onnx.ModelProto) -> bool:
    """Whether it normalises layers; below opset 17 such norms are written out, with a square root each."""
    below = all(entry.version < 17 for entry in proto.opset_import if entry.domain == "")
    return any(node.op_type == ("Sqrt" if below else "LayerNormalization") for node in proto.graph.node)


def to_fp16(source: Path) -> onnx.ModelProto:
    """Conversion to fp16; inputs and outputs stay float32."""
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    proto: onnx.ModelProto = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    ONNXModel(proto).topological_sort()  # the converter puts its casts last
    return proto


def check_fp16_range(source: Path, folder: Path, samples: Samples) -> None:
    """Raise VerificationError where an activation of the fp32 file is too large for fp16.

    ONNX Runtime computes fp16 files in float32 on most CPUs, so running the file does not show it.
    """
    from onnxruntime.quantization.calibrate import create_calibrator

    copy = shutil.copyfile(source, folder / source.name)  # files in between are put beside it
    for beside in side_files(source):
        shutil.copyfile(beside, folder / beside.name)
    calibrator = create_calibrator(copy, None, augmented_model_path=str(folder / "augmented.onnx"))
    calibrator.collect_data(CalibrationReader(samples))
    for name, found in calibrator.compute_data().data.items():
        largest = float(np.abs(found.range_value).max())
        if not largest <= FP16_LARGEST:
            raise VerificationError(
                f"activation {name!r} reaches {largest:.3g}, more than the {FP16_LARGEST:.0f} that fp16 holds: "
                "the fp16 file is not kept. Leave out --dtype fp16."
            )


class CalibrationReader:
    """Samples (n, ...) in the form that ONNX Runtime's calibration takes: at most 1,024, in 16 batches."""

    def __init__(self, samples: Samples) -> None:
        self.batches = self.cut(samples[:CALIBRATION_SAMPLES])

    @staticmethod
    def cut(samples: Samples) -> Iterator[Samples]:
        size = -(-len(samples) // CALIBRATION_BATCHES)
        yield from (samples[start : start + size] for start in range(0, len(samples), size))

    def get_next(self) -> dict[str, Samples] | None:
        batch = next(self.batches, None)
        return None if batch is None else {INPUT_NAME: batch}


def drop_unused_domains(proto: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Remove the operator sets that ONNX Runtime's optimiser declares whether or not they are used."""
    used = {entry.domain for entry in original.opset_import} | {node.domain for node in proto.graph.node}
    kept = [entry for entry in proto.opset_import if entry.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)


def compare(source: Path, path: Path, wanted: Quantisation) -> Comparison:
    """Run both files. Raises: VerificationError: `path` does not load or run, or gives NaN or Inf."""
    expected = logits_of_file(source, wanted.compared)
    try:
        found = logits_of_file(path, wanted.compared)
    except InputError as error:
        fault = first_line(error).removeprefix(f"{path}: ")
        raise VerificationError(f"the {wanted.dtype} file is not kept: {fault}") from error
    return comparison_of(expected, found, wanted)


def logits_of_file(path: Path, dataset: Dataset) -> Any:
    """Logits (n, outputs) of a file for all samples. Raises: InputError: it does not load or run."""
    session = onnx_session.open_session(path)
    parts = batches(dataset, COMPARED_AT_ONCE, seed=None)
    return np.concatenate([onnx_session.class_logits(session, x, dataset.classes, path) for x, _ in parts])


def comparison_of(expected: Any, found: Any, wanted: Quantisation) -> Comparison:
    """Figures of two arrays of logits (n, outputs). Raises: VerificationError: `found` has NaN or Inf."""
    if not np.isfinite(found).all():
        bad = int((~np.isfinite(found)).any(axis=1).sum())
        raise VerificationError(f"the {wanted.dtype} file gives NaN or Inf for {bad} of {len(found)} samples: not kept")
    ours, theirs, labels = found.argmax(axis=1), expected.argmax(axis=1), wanted.compared.y
    scale = max(1.0, float(np.abs(expected).max()))
    return Comparison(
        samples=len(found),
        agreement=float((ours == theirs).mean()),
        difference=float(np.abs(found - expected).max()) / scale,
        accuracy=float((ours == labels).mean()) if wanted.labelled else None,
        fp32_accuracy=float((theirs == labels).mean()) if wanted.labelled else None,
    )


def check_agreement(comparison: Comparison, dtype: Dtype) -> None:
    """Raise VerificationError below the floor."""
    floor = AGREEMENT_FLOOR[dtype]
    if comparison.agreement < floor:
        raise VerificationError(
            f"the {dtype} file puts only {comparison.agreement:.1%} of {comparison.samples} samples in the class that "
            f"the fp32 file does, less than {floor:.0%}: not kept.\nLeave out --dtype {dtype}"
            + (", or calibrate on more samples like those the device will see." if dtype == "int8" else ".")
        )
