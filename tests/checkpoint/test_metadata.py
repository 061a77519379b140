"""Records in files: strict when read, stable when written."""

import numpy as np
import pytest

from cahfp_cli.checkpoint.metadata import (
    CheckpointMetadata,
    ModelSpec,
    Provenance,
    SubmodelMetadata,
    dump_metadata,
    metadata_or_none,
    read_metadata,
)
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.errors import InputError

pytestmark = pytest.mark.quick

PROVENANCE = Provenance(tool="cahfp 0", command="test", options={"b": 1, "a": [1.5, None]})
RECORD = CheckpointMetadata(
    model=ModelSpec(spec="vgg11", args={"width": 8, "bias": True}),
    input_shape=(1, 8, 8),
    classes=10,
    provenance=PROVENANCE,
)


def with_text(path, metadata):
    save_arrays(path, {"x": np.zeros(2)}, metadata)
    return open_safetensors(path)


def test_a_record_survives_a_round_trip(tmp_path):
    with with_text(tmp_path / "x", dump_metadata(RECORD)) as file:
        assert read_metadata(file, CheckpointMetadata) == RECORD
        assert metadata_or_none(file, CheckpointMetadata) == RECORD


def test_a_foreign_file_has_none(tmp_path):
    with with_text(tmp_path / "x", {"format": "pt"}) as file:
        assert metadata_or_none(file, CheckpointMetadata) is None
        with pytest.raises(InputError, match="no `cahfp` metadata"):
            read_metadata(file, CheckpointMetadata)


TEXT = dump_metadata(RECORD)["cahfp"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "whole"),
        ("{}", "provenance"),
        (TEXT.replace('"classes":10', '"classes":"10"'), "classes"),
        (TEXT.replace('"classes":10', '"classes":true'), "classes"),
        (TEXT.replace('"classes":10', '"classes":0'), "classes"),
        (TEXT.replace('"classes":10', '"classes":10.0'), "classes"),
        (TEXT.replace('"classes":10', '"clases":10'), "clases"),
        (TEXT.replace('"classes":10', '"classes":10,"classes":11'), "twice"),
        (TEXT.replace("[1,8,8]", "[1,-8,8]"), "input_shape.1"),
        (TEXT.replace("checkpoint/1", "checkpoint/2"), "'format'.*checkpoint/2"),
        (TEXT.replace("[1.5,null]", "[" * 90 + "]" * 90), "nested"),
        (TEXT.replace("1.5", "1e999"), "too large"),
        (TEXT.replace("1.5", "Infinity"), "Infinity"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_with_its_key(tmp_path, text, words):
    with with_text(tmp_path / "x", {"cahfp": text}) as file, pytest.raises(InputError, match=words) as error:
        read_metadata(file, CheckpointMetadata)
    assert str(error.value).startswith(str(tmp_path / "x"))


def test_another_kind_of_file_is_named_by_its_format(tmp_path):
    with (
        with_text(tmp_path / "x", dump_metadata(RECORD)) as file,
        pytest.raises(InputError, match=r"'format'.*checkpoint/1"),
    ):
        read_metadata(file, SubmodelMetadata)
