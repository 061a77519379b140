"""What our safetensors files say about themselves: one JSON object under the metadata key `cahfp`."""

import json
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from cahfp_cli.checkpoint import strict_json
from cahfp_cli.checkpoint.sharded import Tensors
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.errors import InputError

KEY = "cahfp"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Scalar = bool | int | float | str | None
InputDtype = Literal["float32", "int64"]
"""What data become when they are read: images and features float32, tokens int64."""


class Record(BaseModel):
    """A frozen schema that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class InputFile(Record):
    """One input of a command: its name without folders, and the sha256 of its bytes."""

    file: str
    sha256: Digest


class Provenance(Record):
    """How a file came to be; holds no time and no folder, so that equal runs give equal bytes."""

    tool: str
    command: str
    options: dict[str, JsonValue] = {}
    inputs: tuple[InputFile, ...] = ()


class ModelSpec(Record):
    """How to build a network: a spec as on the command line, and the keyword arguments of its factory."""

    spec: str
    args: dict[str, Scalar] = {}


class CheckpointMetadata(Record):
    """Metadata of a global checkpoint. input_dtype: None in files from before it was recorded."""

    format: Literal["cahfp.checkpoint/1"] = "cahfp.checkpoint/1"
    model: ModelSpec | None = None
    input_shape: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    input_dtype: InputDtype | None = None
    classes: Annotated[int, Field(ge=1)] | None = None
    num_examples: Annotated[int, Field(ge=1)] | None = None
    provenance: Provenance


class SubmodelMetadata(Record):
    """Metadata of `submodel.safetensors`: what the compact tensors belong to."""

    format: Literal["cahfp.submodel/1"] = "cahfp.submodel/1"
    model: ModelSpec
    input_shape: tuple[Annotated[int, Field(ge=1)], ...]
    input_dtype: InputDtype = "float32"
    classes: Annotated[int, Field(ge=1)]
    checkpoint: Digest
    profile: str | None = None
    num_examples: Annotated[int, Field(ge=1)] | None = None
    provenance: Provenance


class CurvatureMetadata(Record):
    """Metadata of `curvature.safetensors`: the global checkpoint that the submodel is of, how many samples of the
    client's were measured, and how many labels were drawn for each, None where every class has its share."""

    format: Literal["cahfp.curvature/1"] = "cahfp.curvature/1"
    checkpoint: Digest
    samples: Annotated[int, Field(ge=1)]
    draws: Annotated[int, Field(ge=1)] | None = None
    provenance: Provenance


RecordType = TypeVar("RecordType", bound=Record)


def dump_metadata(record: Record) -> dict[str, str]:
    """The metadata of a safetensors file that carries `record`; equal records give equal text.

    Raises: ValueError: a number in the record is NaN or infinite.
    """
    fields = record.model_dump(mode="json")
    return {KEY: json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False), "format": "pt"}


def read_metadata(file: Tensors, schema: type[RecordType]) -> RecordType:
    """The record of a file that one of our commands wrote.

    Raises: InputError: the file has no such record, or one that does not fit `schema` (the key at fault is named).
    """
    record = metadata_or_none(file, schema)
    if record is None:
        raise InputError(
            f"{file.path}: it has no `{KEY}` metadata, so cahfp did not write it; pass a file that it did."
        )
    return record


def metadata_or_none(file: Tensors, schema: type[RecordType]) -> RecordType | None:
    """As `read_metadata`, but None for a file that is not one of ours.

    Raises: InputError: the file has a record that does not fit `schema`.
    """
    if KEY not in file.metadata:
        return None
    text = file.metadata[KEY]
    try:
        strict_json.parse(text)
    except ValueError as error:
        raise InputError(f"{file.path}: its `{KEY}` metadata is damaged: {error}.\nMake the file again.") from None
    try:
        # strict: "10" or true is not a number. Strict mode reads tuples from JSON text, but not from Python lists.
        return schema.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise InputError(f"{file.path}: its `{KEY}` metadata does not fit: {_first_fault(error)}.") from None


def _first_fault(error: ValidationError) -> str:
    """Where the record is wrong, and how, in one line."""
    fault = min(error.errors(include_url=False), key=lambda fault: fault["loc"][:1] != ("format",))
    key = shown(".".join(map(str, fault["loc"])) or "(whole)")
    given = fault["input"]
    value = f" (it is {shown(str(given))})" if isinstance(given, str | int | float | bool) else ""
    return f"key {key}: {fault['msg'].lower()}{value}"
