"""Which entries of a folder are a submodel's, and so may be replaced: files of its names that say so themselves."""

from pathlib import Path

from cahfp_cli.checkpoint.metadata import CurvatureMetadata, Record, SubmodelMetadata
from cahfp_cli.checkpoint.ownership import format_named_by, format_of_file
from cahfp_cli.errors import InputError
from cahfp_cli.export.side_file import locations
from cahfp_cli.formats.files import CURVATURE, FILES, INDEX_MAP, ONNX, ONNX_WEIGHTS, REPORT, TENSORS
from cahfp_cli.formats.index_map_file import IndexMapMetadata
from cahfp_cli.formats.report import read_report

RECORDS: dict[str, type[Record]] = {
    TENSORS: SubmodelMetadata,
    INDEX_MAP: IndexMapMetadata,
    CURVATURE: CurvatureMetadata,
}


def foreign_in_submodel(folder: Path) -> str | None:
    """See `checkpoint.ownership.Foreign`; the output is a submodel folder."""
    found = sorted(folder.iterdir())
    return next((path.name for path in found if not belongs(path)), None)


def belongs(path: Path) -> bool:
    """Whether a file is one that a submodel folder has, and one of ours."""
    if path.name == ONNX_WEIGHTS:  # it holds nothing but numbers: the file that they belong to speaks for it
        model = path.with_name(ONNX)
        return path.is_file() and model.is_file() and belongs(model) and path.name in locations(model)
    if path.name not in FILES or not path.is_file():
        return False
    if path.name == REPORT:
        try:
            return bool(read_report(path))
        except InputError:
            return False
    if path.name in RECORDS:
        return format_of_file(path) == format_named_by(RECORDS[path.name])
    return any(key.startswith("cahfp.") for key in onnx_metadata_keys(path))


def onnx_metadata_keys(path: Path) -> list[str]:
    """The keys of an ONNX file's metadata, none if it is not one."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return [entry.key for entry in onnx.load(str(path), load_external_data=False).metadata_props]
    except (DecodeError, UnicodeDecodeError, OSError):  # text is decoded where it is read
        return []
