"""Worker processes that die with their parent, and whose death ends the run with one line."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import TracebackType
from typing import Self, TypeVar

from shards.errors import InputError
from shards.processes import start_worker

Task = TypeVar("Task")
Result = TypeVar("Result")


class Pool:
    """Processes started afresh (spawn: nothing inherited), with a bounded number of tasks under way."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor = ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=start_worker, initargs=(os.getpid(),)
        )

    def map_unordered(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results as they come. A task is drawn when a worker is nearly free, so that few exist at a time."""
        pending: set[Future[Result]] = set()
        try:
            for task in tasks:
                pending.add(self._executor.submit(function, task))
                if len(pending) > self._workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool:
            raise InputError(
                "a worker process was killed (out of memory?); run the command again to go on, or with fewer --workers"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            for process in list((self._executor._processes or {}).values()):
                process.kill()
