"""Commands as forks of one process that has imported what they import; `forking.py` is that process.

A fork is a process of its own: its arguments, folder, environment, streams, exit code and end are those of a command
that a shell starts, and nothing that it does stays. What differs: it did not import, and hashes of texts have the
server's seed.
"""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SERVER = Path(__file__).with_name("forking.py")
READ_LATER = "CAHFP_"
"""Variables that a command reads when it needs them; others may have been read by what the server imported."""


class Server:
    """Lives until this process ends, or closes `_control`."""

    def __init__(self, command: Path, environment: Mapping[str, str]) -> None:
        """Args: command: path of the installed script. environment: what its imports see."""
        self._environment = dict(environment)
        self._control, theirs = socket.socketpair()
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(SERVER), str(theirs.fileno()), str(command)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=self._environment,
                pass_fds=[theirs.fileno()],
            )

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Whether imports in this environment are those that the server has done."""
        differing = environment.items() ^ self._environment.items()
        return all(name.startswith(READ_LATER) for name, _ in differing)

    def run(
        self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float
    ) -> tuple[int, str, str]:
        """Run the command. Returns: its exit code, as `subprocess` has it, and what it wrote to its two streams.

        Raises: subprocess.TimeoutExpired: it took longer than so many seconds, and was killed.
        """
        pipes = [os.pipe() for _ in range(3)]
        with tempfile.TemporaryFile() as request:
            request.write(json.dumps([arguments, str(folder), dict(environment)]).encode())
            request.seek(0)
            with self._lock:
                socket.send_fds(self._control, [b"x"], [request.fileno(), *(writing for _, writing in pipes)])
        for _, writing in pipes:
            os.close(writing)
        out, err, ended = read_all([reading for reading, _ in pipes], timeout, arguments)
        _, code = ended.split()
        return int(code), out.decode(), err.decode()


def read_all(descriptors: Sequence[int], timeout: float, arguments: Sequence[str]) -> list[bytes]:
    """Everything from several pipes until all are closed at their other end. The last one begins with the number of the
    process to be killed where that takes too long."""
    found: dict[int, bytes] = dict.fromkeys(descriptors, b"")
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for descriptor in descriptors:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(deadline - time.monotonic(), 0))
            if not ready:
                os.kill(int(found[descriptors[-1]].split()[0]), signal.SIGKILL)
                for descriptor in selector.get_map():
                    os.close(descriptor)
                raise subprocess.TimeoutExpired(list(arguments), timeout)
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                found[key.fd] += chunk
                if not chunk:
                    selector.unregister(key.fd)
                    os.close(key.fd)
    return [found[descriptor] for descriptor in descriptors]
