"""Processes that do the runs of a simulation, and live no longer than the process that began them."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from threading import Thread
from typing import Any

from cahfp_cli.errors import InputError


class Inherited:
    """A descriptor of which a process that is being spawned gets its own copy when it gets this object."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Callable[[Any], "Inherited"], tuple[Any]]:
        return _received, (DupFd(self.descriptor),)


def _received(copy: Any) -> Inherited:
    return Inherited(copy.detach())


@contextmanager
def workers(count: int, held: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes to do something.

    However this process ends, also by a signal that it cannot catch, they end at once; so they do where an interruption
    ends the block. Where an error does, what they had begun is finished first.

    Args: held: descriptor of a lock that they hold together with this process, so that it is free only once all have
        ended.
    Raises: InputError: one of them was ended from outside.
    """
    context = get_context("spawn")
    watched, lifeline = context.Pipe(duplex=False)
    with watched, lifeline:
        pool = ProcessPoolExecutor(count, context, initializer=live_on, initargs=(watched, Inherited(held)))
        try:
            yield pool
        except BrokenProcessPool as error:
            raise InputError(
                "a process of --jobs was ended from outside, as when memory runs out; what it had committed is kept.\n"
                "Go on with --resume, with fewer --jobs if memory is short."
            ) from error
        except BaseException as error:
            if not isinstance(error, Exception):
                lifeline.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def live_on(lifeline: Connection, held: Inherited) -> None:
    """In a worker: end when the other end of `lifeline` is closed, as the system does when its process dies. Ctrl-C on
    a terminal, which reaches all processes, is left to that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch(kept: Inherited = held) -> None:
        try:
            lifeline.recv_bytes()
        finally:
            os._exit(1)

    Thread(target=watch, daemon=True).start()
