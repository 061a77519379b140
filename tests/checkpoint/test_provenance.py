"""Provenance names inputs without folders, by content, whatever their order."""

import hashlib

import pytest

from cahfp_cli import __version__
from cahfp_cli.errors import InputError
from cahfp_cli.provenance import provenance

pytestmark = pytest.mark.quick


def test_inputs_go_by_last_name_and_digest_in_an_order_of_their_own(tmp_path):
    (tmp_path / "deep" / "sub").mkdir(parents=True)
    (tmp_path / "deep" / "sub" / "submodel.safetensors").write_bytes(b"s")
    (tmp_path / "deep" / "sub" / "notes.txt").write_bytes(b"n")
    (tmp_path / "a").write_bytes(b"a")
    record = provenance("merge", {"rule": "fill"}, [tmp_path / "deep" / "sub", tmp_path / "a"])
    assert record == provenance("merge", {"rule": "fill"}, [tmp_path / "a", tmp_path / "deep" / "sub"])
    assert record.tool == f"cahfp {__version__}"
    assert [(entry.file, entry.sha256) for entry in record.inputs] == [
        ("a", hashlib.sha256(b"a").hexdigest()),
        ("sub/submodel.safetensors", hashlib.sha256(b"s").hexdigest()),
    ]
    assert str(tmp_path) not in record.model_dump_json()


def test_an_input_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="missing"):
        provenance("merge", {}, [tmp_path / "missing"])
