"""One writer at a time for a folder that grows over hours, by a lock that the system drops when its holders die."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cahfp_cli.errors import InputError


@contextmanager
def sole_writer(folder: Path) -> Iterator[int]:
    """Hold an existing folder; yields the lock's descriptor.

    It is held until the block has ended and every process that inherited the descriptor has closed it or died. File
    systems without locks cannot say who else writes.

    Raises: InputError: it is held already.
    """
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another process is writing into it; wait until it has ended, or name another folder."
            ) from None
        except OSError:
            pass
        yield held
    finally:
        os.close(held)
