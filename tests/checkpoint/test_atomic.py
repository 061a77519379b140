"""A killed or failed writer leaves the old output or the new one, and nothing beside it."""

import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from cahfp_cli.checkpoint import atomic
from cahfp_cli.checkpoint.atomic import atomic_directory, atomic_file, refuse_overwrite
from cahfp_cli.errors import InputError

pytestmark = pytest.mark.quick


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def submodel(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(text)
    return folder


def foreign(folder: Path) -> str | None:
    """A folder of ours holds nothing but `report.json`, a file or a folder `half`."""
    return next((path.name for path in folder.iterdir() if path.name not in ("report.json", "half", "sub")), None)


def write_folder(path: Path, force: bool = False) -> AbstractContextManager[Path]:
    return atomic_directory(path, force, foreign)


def test_file_appears_only_when_complete(tmp_path):
    with atomic_file(tmp_path / "x") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "x").exists()
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".x.")
    assert (tmp_path / "x").read_text() == "new"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_leaves_the_old_output_and_nothing_else(tmp_path, failure):
    (tmp_path / "x").write_text("old")
    submodel(tmp_path / "d", "old")
    with pytest.raises(failure), atomic_file(tmp_path / "x", force=True) as temporary:
        temporary.write_text("new")
        raise failure
    with pytest.raises(failure), write_folder(tmp_path / "d", force=True) as folder:
        (folder / "report.json").write_text("new")
        raise failure
    assert (tmp_path / "x").read_text() == (tmp_path / "d" / "report.json").read_text() == "old"
    assert names(tmp_path) == ["d", "x"]


def test_nothing_is_overwritten_without_force(tmp_path):
    (tmp_path / "x").write_text("old")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "x", tmp_path, tmp_path / "dangling"):
        for write in (atomic_file, write_folder):
            with pytest.raises(InputError, match=r"exists: pass --force"), write(path):
                pass
    refuse_overwrite(tmp_path / "x", force=True)
    with atomic_file(tmp_path / "x", force=True) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "x").read_text() == "new"


def test_output_that_came_into_being_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    for rename in (atomic._renameat2, lambda *_: False):
        monkeypatch.setattr(atomic, "_renameat2", rename)
        with pytest.raises(InputError, match="exists"), atomic_file(tmp_path / "x") as temporary:
            temporary.write_text("new")
            (tmp_path / "x").write_text("other")
        assert (tmp_path / "x").read_text() == "other"
        (tmp_path / "x").unlink()
        assert names(tmp_path) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_renameat2", lambda *_: False)
    submodel(tmp_path / "d", "old")
    (tmp_path / "d" / "half").write_text("old")
    with write_folder(tmp_path / "d", force=True) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("new")
    assert names(tmp_path) == ["d"]
    assert names(tmp_path / "d") == ["sub"]


def test_without_exchange_a_kill_between_the_renames_is_repaired(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_renameat2", lambda *_: False)
    submodel(tmp_path / ".d.old", "old")
    with pytest.raises(ValueError), write_folder(tmp_path / "d", force=True):
        assert (tmp_path / "d" / "report.json").read_text() == "old"
        raise ValueError
    assert names(tmp_path) == ["d"]


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path, monkeypatch):
    home = submodel(tmp_path / "home", "")
    theirs = submodel(tmp_path / "foreign", "")
    (theirs / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(home))
    for path in (home, theirs, tmp_path / "file"):
        with pytest.raises(InputError, match=str(path)), write_folder(path, force=True):
            pass
    monkeypatch.chdir(submodel(tmp_path / "here", ""))
    with pytest.raises(InputError, match="working folder"), write_folder(Path(), force=True):
        pass
    assert names(tmp_path) == ["file", "foreign", "here", "home"]


def test_a_folder_of_someone_elses_under_the_name_of_an_exchange_is_neither_taken_nor_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_renameat2", lambda *_: False)
    (tmp_path / ".d.old").mkdir()
    (tmp_path / ".d.old" / "thesis.tex").write_text("mine")
    with write_folder(tmp_path / "d", force=True) as folder:
        (folder / "report.json").write_text("new")
    with pytest.raises(InputError, match=r"thesis\.tex"), write_folder(tmp_path / "d", force=True) as folder:
        (folder / "report.json").write_text("newer")
    assert (tmp_path / ".d.old" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "d" / "report.json").read_text() == "new"


def test_devices_and_folders_are_not_replaced_by_a_file(tmp_path):
    for path in (Path("/dev/null"), tmp_path):
        with pytest.raises(InputError, match="not a file"), atomic_file(path, force=True):
            pass


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_file(tmp_path / "link", force=True) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_missing_or_unwritable_folder_is_named(tmp_path):
    for write in (atomic_file, write_folder):
        with pytest.raises(InputError, match=str(tmp_path / "missing")), write(tmp_path / "missing" / "x"):
            pass
        with pytest.raises(InputError, match="/proc"), write(Path("/proc/x")):
            pass


WRITER = """
import os, signal, sys
from functools import partial
from pathlib import Path
from cahfp_cli.checkpoint.atomic import atomic_directory, atomic_file
folder = partial(atomic_directory, foreign=lambda folder: None)
write = {"file": atomic_file, "folder": folder}[sys.argv[1]]
with write(Path(sys.argv[2]), force=True) as temporary:
    (temporary if sys.argv[1] == "file" else temporary / "half").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_of_killed_writers_are_removed_and_those_of_living_ones_are_not(tmp_path, kind):
    command = [sys.executable, "-c", WRITER, kind, str(tmp_path / "x")]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    dead, living = writers
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"ready\n"
        assert len(names(tmp_path)) == 2
        os.kill(dead.pid, signal.SIGKILL)
        dead.wait()
        (tmp_path / f".x.{dead.pid}.note.tmp").write_text("not a leftover of ours")
        with (atomic_file if kind == "file" else write_folder)(tmp_path / "x"):
            left = [name for name in names(tmp_path) if name.startswith(f".x.{dead.pid}.")]
            assert left == [f".x.{dead.pid}.note.tmp"]
            assert any(name.startswith(f".x.{living.pid}.") for name in names(tmp_path))
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


@pytest.mark.parametrize("number", sorted(atomic.NO_ROOM))
def test_a_full_disk_is_an_input_error_that_names_the_output_and_leaves_the_old_one(tmp_path, number):
    (tmp_path / "x").write_text("old")
    submodel(tmp_path / "d", "old")
    for writer, path in ((atomic_file, tmp_path / "x"), (write_folder, tmp_path / "d")):
        with pytest.raises(InputError) as error, writer(path, force=True):
            raise OSError(number, os.strerror(number))
        assert f"cannot write {path} ({os.strerror(number)})" in str(error.value)
        assert str(error.value).count("\n") == 1
    assert (tmp_path / "x").read_text() == (tmp_path / "d" / "report.json").read_text() == "old"
    assert names(tmp_path) == ["d", "x"]
