"""Who does an ingest's tasks: processes here that die with their parent, or a Dask cluster."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

from ingest.config import IngestConfig, SourceConfig
from shards.errors import InputError
from shards.processes import interrupts_held, start_worker

Task = TypeVar("Task")
Result = TypeVar("Result")

_TASKS_PER_WORKER = 2
"""One at work and one that waits: this process tokenises meanwhile, and is slow to hand out the next."""


class Pool(Protocol):
    """Does tasks, several at a time."""

    def map_unordered(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results as they come. Few tasks exist at a time; each may be done twice, with the same outcome."""
        ...


@contextlib.contextmanager
def open_pool(config: IngestConfig, sources: Sequence[SourceConfig], work: Path) -> Iterator[Pool]:
    """The pool that the config asks for; `work` is the folder of what is being made."""
    if config.scheduler is None:
        with Processes(config.worker_count) as processes:
            yield processes
    else:
        from ingest.cluster import open_cluster

        with open_cluster(config.scheduler, config.scheduler_wait, sources, work) as cluster:
            yield cluster


class Processes:
    """Processes started afresh (spawn: nothing inherited), with a bounded number of tasks under way."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor = ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=start_worker, initargs=(os.getpid(),)
        )

    def map_unordered(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results as they come. A task is drawn when there is room for it, so that few exist at a time."""
        pending: set[Future[Result]] = set()
        try:
            for task in tasks:
                with interrupts_held():
                    pending.add(self._executor.submit(function, task))
                if len(pending) > _TASKS_PER_WORKER * self._workers:
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
        if kind is not None:  # what they still do is not wanted any more
            for process in list(self._executor._processes.values()):
                process.kill()
        # Waited for even so: left to itself, the pool's own thread races with the end of the interpreter.
        self._executor.shutdown(cancel_futures=True)
