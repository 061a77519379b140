"""Work in processes of their own, forked from this one so that imports are shared, with limits on time and memory."""

import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Of one task. seconds: by the clock. gigabytes: of its data. jobs: tasks at a time. folder: where each has its."""

    seconds: float
    gigabytes: float
    jobs: int = 1
    folder: Path | None = None


@dataclass
class Running(Generic[T]):
    """A task's process, its folder, and when it must have ended."""

    task: T
    home: "tempfile.TemporaryDirectory[str]"
    process: BaseProcess
    deadline: float


def each(tasks: Sequence[T], work: Callable[[T, Path], None], limits: Limits) -> Iterator[tuple[T, Path, str]]:
    """Run `work(task, folder)` for every task; as they end, each task, its folder (gone once the next is asked for) and
    how it was ended if not by itself, "" otherwise."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(tasks), list[Running[T]]()
    while waiting or running:
        while waiting and len(running) < limits.jobs:
            task, home = waiting.pop(0), tempfile.TemporaryDirectory(prefix="cahfp-", dir=limits.folder)
            process = context.Process(target=inside, args=(work, task, Path(home.name), limits.gigabytes))
            process.start()
            running.append(Running(task, home, process, time.monotonic() + limits.seconds))
        time.sleep(0.02)
        for one in list(running):
            late = time.monotonic() > one.deadline
            if one.process.is_alive() and not late:
                continue
            ending = f"more than {limits.seconds:.0f} s" if one.process.is_alive() else ""
            if ending:
                one.process.kill()
            one.process.join()
            yield one.task, Path(one.home.name), ending or ended_by(one.process.exitcode)
            one.home.cleanup()
            running.remove(one)


def ended_by(code: int | None) -> str:
    return f"the process ended by {'signal' if (code or 0) < 0 else 'code'} {abs(code or 0)}" if code else ""


def inside(work: Callable[[T, Path], None], task: T, home: Path, gigabytes: float) -> None:
    """What the process does: its limit, what it prints into a file, its folder as the current one, its work."""
    limit = int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    noise = (home / "noise.txt").open("w")
    os.dup2(noise.fileno(), 1)
    os.dup2(noise.fileno(), 2)
    os.chdir(home)
    work(task, home)
