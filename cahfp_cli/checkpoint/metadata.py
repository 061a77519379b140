"""What our safetensors files say about themselves: one JSON object under the metadata key `cahfp`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Scalar = bool | int | float | str | None


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
    """Metadata of a global checkpoint."""

    format: Literal["cahfp.checkpoint/1"] = "cahfp.checkpoint/1"
    model: ModelSpec | None = None
    input_shape: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    classes: Annotated[int, Field(ge=1)] | None = None
    num_examples: Annotated[int, Field(ge=1)] | None = None
    provenance: Provenance


class SubmodelMetadata(Record):
    """Metadata of `submodel.safetensors`: what the compact tensors belong to."""

    format: Literal["cahfp.submodel/1"] = "cahfp.submodel/1"
    model: ModelSpec
    input_shape: tuple[Annotated[int, Field(ge=1)], ...]
    classes: Annotated[int, Field(ge=1)]
    checkpoint: Digest
    profile: str | None = None
    num_examples: Annotated[int, Field(ge=1)] | None = None
    provenance: Provenance
