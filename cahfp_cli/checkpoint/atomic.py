"""Write a file or a folder so that a killed command leaves the old one or the new one, never half of one.

Work happens under a hidden name in the same folder, `.NAME.PID.TOKEN.tmp`, held under a lock that the system drops
when the process dies; whoever next writes the same target removes what has lost its lock. Commit is fsync, rename,
fsync of the folder.
"""

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cahfp_cli.checkpoint.ownership import Foreign
from cahfp_cli.checkpoint.strict_json import shown
from cahfp_cli.errors import InputError, UsageError

MAX_CLAIMS = 100
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # what only writing fails with
_NO_REPLACE, _EXCHANGE = 1, 2  # flags of renameat2 in linux/fs.h
_AT_FDCWD = -100


def refuse_overwrite(path: Path, force: bool) -> None:
    """Raises: InputError: `path` exists (a dangling link counts) and `force` is not set."""
    if not force and os.path.lexists(path):
        raise InputError(f"{path} exists: pass --force to overwrite it.")


def check_no_input(path: Path, inputs: Iterable[Path]) -> None:
    """Raises: UsageError: the output `path` is one of the files that are read, and would take its place."""
    if any(one.exists() and path.exists() and path.samefile(one) for one in inputs):
        raise UsageError(f"{path}: it is read by this command, and the output would replace it; name another output.")


def check_file_target(path: Path, force: bool) -> Path:
    """The real path of a file that is to be written; long commands call this before they start.

    Raises: InputError: `path` exists without `force` or is not a regular file; its folder is missing or unwritable.
    """
    refuse_overwrite(path, force)
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise InputError(f"{path}: it is a folder or a device, not a file; name a file to write.")
    _check_parent(target)
    return target


def check_folder_target(path: Path, force: bool, foreign: Foreign) -> Path:
    """The real path of a folder that is to be written; long commands call this before they start.

    Args: foreign: finds what in the folder is no part of such an output, see `atomic_directory`.
    Raises: InputError: `path` exists without `force` or must not be replaced; its folder is missing or unwritable.
    """
    refuse_overwrite(path, force)
    target = Path(os.path.realpath(path))
    _check_replaceable(path, target, foreign)
    _check_parent(target)
    return target


@contextmanager
def atomic_file(path: Path, force: bool = False) -> Iterator[Path]:
    """Yield a new empty file to write in place of `path`; it becomes `path` when the block ends without an exception.

    A link is followed: the file it points to is replaced.

    Raises: InputError: `path` exists without `force` or is not a regular file; its folder is missing or unwritable; the
        disk is full (also where the block runs into that).
    """
    target = check_file_target(path, force)
    remove_leftovers(target)
    temporary, lock = _claim(target, folder=False)
    try:
        with _full_disk_explained(path):
            yield temporary
            _fsync(temporary)
            if force:
                temporary.replace(target)
            else:
                _rename_new(temporary, target)
            _fsync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def atomic_directory(path: Path, force: bool, foreign: Foreign) -> Iterator[Path]:
    """Yield a new empty folder to fill in place of `path`; it becomes `path` when the block ends without an exception.

    With `force` an existing folder is replaced as a whole, if nothing in it is foreign to such an output and neither
    the working folder nor the home folder lies in it.

    Raises: InputError: `path` exists without `force` or must not be replaced; its folder is missing or unwritable; the
        disk is full (also where the block runs into that).
    """
    target = check_folder_target(path, force, foreign)
    _restore(target, foreign)
    remove_leftovers(target)
    temporary, lock = _claim(target, folder=True)
    try:
        with _full_disk_explained(path):
            yield temporary
            for folder, _, files in os.walk(temporary):
                for name in files:
                    _fsync(Path(folder, name))
                _fsync(Path(folder))
            if force and target.exists():
                _check_replaceable(path, target, foreign)
                _replace_folder(temporary, target, foreign)
            else:
                _rename_new(temporary, target)
            _fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after an exchange, this is the old folder
        os.close(lock)


@contextmanager
def _full_disk_explained(path: Path) -> Iterator[None]:
    """The system's error names at most the temporary file, which is gone by the time that anyone reads it."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise InputError(
            f"cannot write {path} ({error.strerror}); what was there before is unchanged.\n"
            "Free some space, raise the limit on the size of files, or name an output elsewhere."
        ) from error


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes left behind while they wrote `target`."""
    if not target.parent.is_dir() or not os.access(target.parent, os.R_OK):
        return
    for leftover in target.parent.iterdir():
        if leftover.name.startswith(f".{target.name}.") and leftover.suffix == ".tmp" and _is_ours(leftover, target):
            lock = _lock(leftover)
            if lock is None:
                continue
            try:
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
            finally:
                os.close(lock)


def _is_ours(leftover: Path, target: Path) -> bool:
    pid, _, token = leftover.name[len(target.name) + 2 : -len(".tmp")].partition(".")
    return pid.isdecimal() and len(token) == 8 and set(token) <= set("0123456789abcdef")


def _claim(target: Path, folder: bool) -> tuple[Path, int]:
    """Create and lock a temporary file or folder beside `target`; returns it and the descriptor of its lock."""
    for _ in range(MAX_CLAIMS):
        temporary = target.parent / f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            if folder:
                temporary.mkdir()
            else:
                os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
            lock = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        except FileExistsError:
            continue
        except FileNotFoundError:
            if not target.parent.is_dir():
                raise InputError(f"{target.parent}: there is no such folder; create it first.") from None
            continue  # another process took the new name for a leftover before it was locked
        except OSError as error:
            raise InputError(f"{target.parent}: cannot write into this folder ({error.strerror}).") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        except OSError:
            return temporary, lock  # a file system without locks: its leftovers stay
        if os.fstat(lock).st_nlink:
            return temporary, lock
        os.close(lock)
    raise InputError(f"{target.parent}: cannot create a file in this folder; name another output.")


def _lock(leftover: Path) -> int | None:
    """The descriptor of an exclusive lock on `leftover`, or None while a living process holds it."""
    try:
        if not stat.S_ISREG(leftover.lstat().st_mode) and not stat.S_ISDIR(leftover.lstat().st_mode):
            return None
        lock = os.open(leftover, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _check_parent(target: Path) -> None:
    parent = target.parent
    if not parent.is_dir():
        fault = "it is a file, not a folder" if parent.exists() else "there is no such folder; create it first"
        raise InputError(f"{parent}: {fault}.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{parent}: cannot write into this folder (permission denied).")


def _check_replaceable(path: Path, target: Path, foreign: Foreign) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{path}: it is not a folder, so no folder can replace it; name another output.")
    if any(place.is_relative_to(target) for place in (Path.cwd().resolve(), Path.home().resolve())):
        raise InputError(f"{path}: it holds the working folder or the home folder and is not replaced; name another.")
    name = foreign(target)
    if name is not None:
        raise InputError(
            f"{path}: it holds {shown(name)}, which is not an output of cahfp of this kind and would be lost.\n"
            "Not even --force replaces such a folder: name another output, or move what you want to keep."
        )


def _replace_folder(temporary: Path, target: Path, foreign: Foreign) -> None:
    """Put `temporary` in the place of the folder `target`.

    On Linux the two names are exchanged in one step. Where the system or file system cannot, there are two renames,
    by way of `.NAME.old`; killed between them, the old folder is put back by `_restore` at the next writing.
    """
    if _renameat2(temporary, target, _EXCHANGE):
        return
    old = _old(target)
    if old.exists():
        _check_replaceable(old, old, foreign)
        shutil.rmtree(old)
    target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _restore(target: Path, foreign: Foreign) -> None:
    old = _old(target)
    if old.is_dir() and not target.exists() and foreign(old) is None:
        old.rename(target)


def _old(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _rename_new(temporary: Path, target: Path) -> None:
    """Rename to a name that must not exist, even if it came into being while we worked."""
    try:
        if _renameat2(temporary, target, _NO_REPLACE):
            return
    except FileExistsError:
        pass
    refuse_overwrite(target, force=False)
    temporary.rename(target)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Linux's rename with flags; False where the system or the file system does not have it."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flag)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(target))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
