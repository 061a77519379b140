"""A reconstruction that is killed or runs out of disk leaves the old global checkpoint or the whole new one."""

import inspect
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cahfp_cli.checkpoint.safetensors_file import open_safetensors
from cahfp_cli.reconstruction.merge import reconstruct
from tests.support.clients_on_disk import Fleet, fleet

COMMAND = Path(sys.executable).with_name("cahfp")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(inspect.getfile(reconstruct)).parents[2]), "OMP_NUM_THREADS": "1"}

# Says when the imports are done, so that the kills fall into the work; then stops for good at a share of the writing.
WRITER = """
import sys, time
from pathlib import Path
from cahfp_cli.checkpoint.metadata import Provenance
from cahfp_cli.reconstruction.merge import reconstruct
def wait(done, total):
    if done >= total * float(sys.argv[1]):
        print("waiting", flush=True)
        time.sleep(60)
checkpoint, output, *folders = map(Path, sys.argv[2:])
print("ready", flush=True)
reconstruct(checkpoint, folders, output, provenance=Provenance(tool="t", command="c"), on_progress=wait, force=True)
"""
NEVER = 2.0


def writer(it: Fleet, output: Path, share: float) -> subprocess.Popen[str]:
    """A process that is about to merge, or at `share` of the writing has begun to wait."""
    command = [sys.executable, "-c", WRITER, str(share), str(it.checkpoint), str(output), *map(str, it.folders)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if share != NEVER:
        assert process.stdout.readline() == "waiting\n"
    return process


def test_a_kill_at_20_random_moments_leaves_the_old_global_or_the_whole_new_one(tmp_path):
    """The global checkpoint is replaced in place, so its old bytes are also the input of the next attempt."""
    it = fleet(tmp_path, 6, 3, widths=(3, 400, 300))
    before = sorted(tmp_path.iterdir())
    old = it.checkpoint.read_bytes()
    process = writer(it, it.checkpoint, NEVER)
    ready = time.monotonic()
    assert process.wait() == 0
    duration, new = time.monotonic() - ready, it.checkpoint.read_bytes()
    assert new != old
    random = np.random.default_rng(0)
    found = []
    for moment in random.uniform(0, 1.1, 20):
        it.checkpoint.write_bytes(old)
        process = writer(it, it.checkpoint, NEVER)
        time.sleep(duration * moment)
        process.kill()
        process.communicate()
        found.append(it.checkpoint.read_bytes())
        assert found[-1] in (old, new), moment
    assert old in found
    it.checkpoint.write_bytes(old)
    assert writer(it, it.checkpoint, NEVER).wait() == 0
    assert it.checkpoint.read_bytes() == new
    assert sorted(tmp_path.iterdir()) == before, "the next run removes what the killed ones left"


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.9, 1.0])
def test_a_kill_in_the_middle_of_writing_leaves_what_was_there(tmp_path, share, old):
    it = fleet(tmp_path, 6, 2)
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "merged.safetensors"
    if old is not None:
        output.write_bytes(old)
    process = writer(it, output, share)
    assert [path.name[:20] for path in sorted(output.parent.iterdir())][:1] == [".merged.safetensors."]
    process.kill()
    process.communicate()
    assert (output.read_bytes() if output.exists() else None) == old
    assert writer(it, output, NEVER).wait() == 0
    assert list(output.parent.iterdir()) == [output]
    with open_safetensors(output) as file:
        assert file.tensors.keys() == it.tensors.keys()


@pytest.mark.parametrize("place", ["nothing", "header", "half", "last byte"])
def test_a_full_disk_is_a_clear_error_and_leaves_the_old_global(tmp_path, place):
    """RLIMIT_FSIZE stands for the disk: the writing of any file beyond it fails, with EFBIG in place of ENOSPC."""
    it = fleet(tmp_path, 6, 2, widths=(3, 100, 80))
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "merged.safetensors"
    command = [str(COMMAND), "reconstruct", str(it.checkpoint), *map(str, it.folders), "-o", str(output), "--force"]

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=ENVIRONMENT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )

    done = run(resource.RLIM_INFINITY)
    assert done.returncode == 0, done.stderr
    size = output.stat().st_size
    output.write_bytes(b"old")
    done = run({"nothing": 0, "header": 100, "half": size // 2, "last byte": size - 1}[place])
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: cannot write {output} (File too large)")
    assert done.stderr.count("\n") == 2
    assert "Traceback" not in done.stderr
    assert [path.read_bytes() for path in output.parent.iterdir()] == [b"old"]


MOUNTED = """
mount -t tmpfs -o size="$SIZE" tmpfs "$DISK" || exit 77
printf old > "$DISK/merged.safetensors"
"$@"
code=$?
echo; ls -A "$DISK"; cat "$DISK/merged.safetensors"
exit $code
"""
"""Run a command with a small disk of its own that nobody else sees, and then show what is on it."""


def test_a_disk_that_is_really_full_is_a_clear_error_too(tmp_path):
    it = fleet(tmp_path, 6, 2, widths=(3, 100, 80))
    disk = tmp_path / "disk"
    disk.mkdir()
    output = disk / "merged.safetensors"
    command = [str(COMMAND), "reconstruct", str(it.checkpoint), *map(str, it.folders), "-o", str(output), "--force"]
    try:
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", MOUNTED, "sh", *command],
            capture_output=True,
            text=True,
            check=False,
            env={**ENVIRONMENT, "DISK": str(disk), "SIZE": str(it.checkpoint.stat().st_size // 2)},
        )
    except FileNotFoundError:
        pytest.skip("unshare is not installed, so that no disk can be mounted")
    if done.returncode in (1, 77):
        pytest.skip("this system lets no user mount a disk of its own")
    assert done.returncode == 3
    assert done.stderr.startswith(f"error: cannot write {output} (No space left on device)")
    assert done.stderr.count("\n") == 2
    assert done.stdout.split() == [output.name, "old"]
