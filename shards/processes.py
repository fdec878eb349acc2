"""Worker processes that do not outlive their parent, and a pool of them."""

import contextlib
import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Self, TypeVar

from shards.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")
Pending = deque[Future[Result]]

_TASKS_PER_WORKER = 2
"""One at work and one that waits: the parent has other work, and is slow to hand out the next."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send signal `number` to this process when its parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def keep_memory() -> None:
    """Have malloc keep what is freed for the next use: a page from the kernel costs 2 to 10 us on a virtual machine.

    Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most it takes
        mallopt(_M_ARENA_MAX, 1)  # what one thread frees is for all


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back inside the block: a worker that starts in it is not hit while it imports, and says nothing."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(parent: int) -> None:
    """Initializer of a pool's workers: leave Ctrl-C to the parent, which says so, and die with it."""
    keep_memory()
    sys.setswitchinterval(0.0005)  # its threads wait for disks: 5 ms for the interpreter is more than a disk takes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # what `interrupts_held` left
    die_with_parent()
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


class Processes:
    """Processes started afresh (spawn: nothing inherited), with a bounded number of tasks under way."""

    def __init__(self, workers: int) -> None:
        self._most = _TASKS_PER_WORKER * workers
        self._executor = ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=start_worker, initargs=(os.getpid(),)
        )

    def map_unordered(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results as they come. A task is drawn when there is room for it, so that few exist at a time."""
        return self._through(function, tasks, _finished)

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """The same in the order of the tasks; few results wait for one that is slow."""
        return self._through(function, tasks, _oldest)

    def _through(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        take: Callable[[Pending[Result]], Iterator[Result]],
    ) -> Iterator[Result]:
        """`take` takes what it gives out of the tasks under way, the oldest of which is the first."""
        pending: Pending[Result] = deque()
        with _deaths_told():
            for task in tasks:
                pending.append(self._submit(function, task))
                if len(pending) > self._most:
                    yield from take(pending)
            while pending:
                yield from take(pending)

    def _submit(self, function: Callable[[Task], Result], task: Task) -> Future[Result]:
        with interrupts_held():
            return self._executor.submit(function, task)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # what they still do is not wanted any more
            for process in list(self._executor._processes.values()):
                process.kill()
        # Waited for even so: left to itself, the pool's own thread races with the end of the interpreter.
        self._executor.shutdown(cancel_futures=True)


def _oldest(pending: Pending[Result]) -> Iterator[Result]:
    yield pending.popleft().result()


def _finished(pending: Pending[Result]) -> Iterator[Result]:
    done, rest = wait(pending, return_when=FIRST_COMPLETED)
    pending.clear()
    pending.extend(rest)
    yield from (future.result() for future in done)


@contextlib.contextmanager
def _deaths_told() -> Iterator[None]:
    try:
        yield
    except (BrokenProcessPool, BrokenPipeError):  # the latter of one that ends before it was told what it is for
        raise InputError(
            "a worker process was killed (out of memory?); run the command again, or with fewer --workers"
        ) from None
