"""The process that `forked.Server` asks for commands: `python forking.py SOCKET COMMAND`.

It imports what commands import and then forks for each one. Every request is one byte with four descriptors: a file of
JSON [arguments, folder, environment], where standard output and standard error go, and where the number of the
command's process is written and then, once it ended, its exit code. It ends when the socket is closed.
"""

import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import sys
import tempfile

LIBRARIES = (
    *("torch.export", "torch.onnx", "torch.onnx._internal.exporter._core", "torch.func", "torch.testing"),
    *("onnx", "onnxscript", "onnxscript.optimizer", "scipy.optimize", "scipy.stats"),
    *("sklearn.datasets", "safetensors.torch", "rich.progress", "PIL.Image", "matplotlib.figure"),
)
"""Not ONNX Runtime, which is imported in no time but begins a thread, and a fork has none but the one that forks."""
APART = "cahfp_cli.federation.flower"
"""Needs libraries of its own, and sets variables before it imports them."""
Descriptors = list[int]


def import_all() -> None:
    """What some command imports sooner or later."""
    import cahfp_cli

    for module in pkgutil.walk_packages(cahfp_cli.__path__, "cahfp_cli.", onerror=lambda name: None):
        if not module.name.startswith(APART) and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in LIBRARIES:
        importlib.import_module(name)


def serve(control: socket.socket) -> list[str]:
    """Returns only in the process of a command: its arguments."""
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 4)
        if not descriptors:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            return watched(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        reap()


def reap() -> None:
    """Let watchers go that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        return


def watched(request: int, stdout: int, stderr: int, ended: int) -> list[str]:
    """Fork the command's process, which returns its arguments, and stay behind to tell how it ended."""
    process = os.fork()
    if process == 0:
        os.close(ended)
        return prepared(request, stdout, stderr)
    for descriptor in (request, stdout, stderr):
        os.close(descriptor)
    os.write(ended, f"{process} ".encode())
    _, status = os.waitpid(process, 0)
    os.write(ended, str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def prepared(request: int, stdout: int, stderr: int) -> list[str]:
    """Make this process what a shell would have started."""
    with os.fdopen(request) as file:
        arguments, folder, environment = json.load(file)
    for descriptor, number in ((stdout, 1), (stderr, 2)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # it follows the environment
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return arguments


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the test run ends, and with it this
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.path[0] = os.path.dirname(sys.argv[2])  # noqa: PTH120  # as for the script itself
    import_all()
    gc.freeze()  # so that collecting does not copy every page
    sys.argv = serve(control)
    runpy.run_path(sys.argv[0], run_name="__main__")
