"""`cahfp reconstruct` as a process: streams, exit codes, and what it imports."""

import json
import resource
import subprocess
import sys

import pytest

from cahfp_cli.checkpoint.digest import content_digest
from cahfp_cli.checkpoint.metadata import CheckpointMetadata, read_metadata
from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.checkpoint.writer import save_arrays
from tests.support.clients_on_disk import fleet

# Only this command, so that the test does not depend on the others.
MAIN = """
import sys, typer
from cahfp_cli.commands.reconstruct import reconstruct
from cahfp_cli.errors import CahfpError
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(reconstruct)
try:
    app()
except CahfpError as error:
    sys.stderr.write(f"error: {error}\\n")
    sys.exit(error.exit_code)
finally:
    assert "torch" not in sys.modules
"""


def run(*arguments: object, **options):
    command = [sys.executable, "-c", MAIN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_importing_and_running_never_imports_torch_and_the_core_never_typer_or_rich():
    code = (
        "import sys\n"
        "import cahfp_cli.reconstruction.merge, cahfp_cli.checkpoint.atomic, cahfp_cli.provenance\n"
        "assert not {'torch', 'typer', 'rich', 'onnx'} & sys.modules.keys()\n"
        "import cahfp_cli.commands.reconstruct\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_is_one_object_and_describes_the_file(tmp_path):
    it = fleet(tmp_path, 4, 2)
    output = tmp_path / "out.safetensors"
    done = run(
        it.checkpoint, *it.folders, "-o", output, "--json", "--rule", "covered", "--weight", f"{it.folders[0]}=12"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["digest"] == content_digest(output)
    assert {client["folder"]: client["num_examples"] for client in result["clients"]} == {
        str(it.folders[0]): 12.0,
        str(it.folders[1]): it.examples[1],
    }
    with open_safetensors(output) as file:
        provenance = read_metadata(file, CheckpointMetadata).provenance
    assert provenance.options == {"rule": "covered", "weights": [["client0", 12.0]]}
    assert [entry.file for entry in provenance.inputs] == [
        "client0/index_map.safetensors",
        "client0/submodel.safetensors",
        "client1/index_map.safetensors",
        "client1/submodel.safetensors",
        "global.safetensors",
    ]


def test_compensation_is_kept_on_request_and_that_is_recorded(tmp_path):
    it = fleet(tmp_path, 4, 2, trained=False, compensated=True)
    out, kept = tmp_path / "out.safetensors", tmp_path / "kept.safetensors"
    done = run(it.checkpoint, *it.folders, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["keep_compensation"] is False
    assert content_digest(out) == content_digest(it.checkpoint)
    done = run(it.checkpoint, *it.folders, "-o", kept, "--json", "--keep-compensation")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["keep_compensation"] is True
    assert content_digest(kept) != content_digest(it.checkpoint)
    for path, options in ((out, {"rule": "fill"}), (kept, {"rule": "fill", "keep_compensation": True})):
        with open_safetensors(path) as file:
            assert read_metadata(file, CheckpointMetadata).provenance.options == options
    done = run(it.checkpoint, *it.folders, "-o", kept, "--force", "--keep-compensation")
    assert "rule: fill, compensation kept" in done.stdout


@pytest.mark.parametrize("options", [[], ["--keep-compensation"], ["--dry-run"]])
@pytest.mark.parametrize(
    ("factor", "words"), [(0.0, "has a factor"), (-1.0, "has a factor"), (float("nan"), "has a factor"), (None, "F64")]
)
def test_hostile_factors_exit_3_with_two_lines_at_most_and_no_output(tmp_path, factor, words, options):
    it = fleet(tmp_path, 4, 2, compensated=True)
    path = it.folders[1] / "index_map.safetensors"
    with open_safetensors(path) as file:
        arrays = {name: file.read(name) for name in file.tensors}
        metadata = file.metadata
    arrays["factor.0"] = arrays["factor.0"].astype(float) if factor is None else arrays["factor.0"] * 0 + factor
    save_arrays(path, arrays, metadata)
    done = run(it.checkpoint, *it.folders, "-o", tmp_path / "out", *options)
    assert done.returncode == 3
    assert str(path) in done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") <= 2
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_human_result_on_stdout_and_order_does_not_change_the_bytes(tmp_path):
    it = fleet(tmp_path, 4, 3)
    one, two = tmp_path / "one", tmp_path / "two"
    done = run(it.checkpoint, *it.folders, "-o", one)
    assert done.returncode == 0
    assert "client2" in done.stdout
    assert f"wrote {one}" in done.stdout
    assert done.stderr == ""
    run(it.checkpoint, *reversed(it.folders), "-o", two, "--quiet")
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--rule", "mean"], 2, "fill, covered"),
        (["--weight", "x"], 2, "DIR=N"),
        (["--weight", "x=many"], 2, "DIR=N"),
        (["--weight", "x=3"], 2, "not one of"),
        (["extra-folder"], 3, "extra-folder"),
    ],
)
def test_exit_codes(tmp_path, arguments, code, words):
    it = fleet(tmp_path, 4, 1)
    done = run(it.checkpoint, it.folders[0], "-o", tmp_path / "out", *arguments)
    assert done.returncode == code
    assert words in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_dry_run_checks_and_writes_nothing(tmp_path):
    it = fleet(tmp_path, 4, 2)
    before = sorted(tmp_path.iterdir())
    done = run(it.checkpoint, *it.folders, "-o", tmp_path / "out", "--dry-run", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["written"] is False
    assert sorted(tmp_path.iterdir()) == before


def test_reports_must_not_take_each_others_place(tmp_path):
    it = fleet(tmp_path, 4, 2)
    out, report = tmp_path / "out.safetensors", tmp_path / "report.json"
    for more, words in (
        (["--report", out], "the same file"),
        (["--report", report, "--html", report], "the same file"),
        (["--report", report, "--dry-run"], "merges nothing"),
    ):
        done = run(it.checkpoint, *it.folders, "-o", out, "--force", *more)
        assert done.returncode == 2 and words in done.stderr
    assert not out.exists() and not report.exists()


def test_the_record_names_weights_by_any_path_and_the_checkpoint_before(tmp_path):
    it = fleet(tmp_path, 4, 2)
    out = tmp_path / "out.safetensors"
    weight, momentum = f"{it.folders[0].name}=77", ["--server-momentum", "0.5", "--before", it.checkpoint]
    done = run(it.checkpoint, *it.folders, "-o", out, "--weight", weight, *momentum, cwd=it.folders[0].parent)
    assert done.returncode == 0, done.stderr
    with open_safetensors(out) as file:
        options = read_metadata(file, CheckpointMetadata).provenance.options
    assert options["weights"] == [[it.folders[0].name, 77.0]]
    assert options["before"] == content_digest(it.checkpoint)


def test_many_clients_need_few_open_files(tmp_path):
    it = fleet(tmp_path, 4, 60)
    done = run(
        it.checkpoint,
        *it.folders,
        "-o",
        tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)),
    )
    assert done.returncode == 0, done.stderr
