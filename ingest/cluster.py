"""An ingest's tasks on a Dask cluster (extra `cluster`): `--scheduler ADDRESS`.

Dask sends pickles, which can do anything to who opens them: use a scheduler of your own, on a network of your own or
with `tls://` and certificates (Dask's own configuration, `distributed.comm.tls`). What travels so are row numbers and
names of image files; films and reports go over the file system, which all workers must see under the same paths.
A worker that dies costs its task, which another does again; the scheduler may go at any moment, the rerun goes on.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from ingest.config import SourceConfig
from ingest.remote import Errand, Failure, Sealed, Surroundings, no_task, run_sealed
from shards.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")

_TASKS_PER_THREAD = 2
"""One at work, one that waits beside it: no thread waits for the next to be made."""
_ASK_EVERY_S = 2.0
"""How often the scheduler is asked how many threads there are; clusters grow and shrink."""
_LOGGERS = ("distributed", "distributed.client", "distributed.gc", "tornado.application", "asyncio")


class Cluster:
    """Tasks done by the workers of a Dask cluster, about twice as many under way as they have threads."""

    def __init__(self, client: Any, surroundings: Surroundings, wait: float) -> None:
        """`wait`: seconds without any worker, or without an answer, before giving up."""
        self._client, self._surroundings, self._wait = client, surroundings, wait
        self._run, self._number = uuid.uuid4().hex, 0
        self._threads, self._asked, self._manned = 0, -_ASK_EVERY_S, time.monotonic()

    def check_workers(self) -> None:
        """InputError where there is no worker after the wait, or one cannot do the tasks."""
        while not self._count_threads():
            time.sleep(0.1)
        answers = _speak(lambda: self._client.run(run_sealed, self._seal(no_task, None), on_error="return"))
        for answer in answers.values():
            if isinstance(answer, Sealed):
                _unseal(answer)
            elif not isinstance(answer, OSError):  # that one has just gone
                raise _cannot_run(answer)

    def map_unordered(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results as they come. A task is drawn when there is room for it, so that few exist at a time."""
        arrived: SimpleQueue[Any] = SimpleQueue()
        pending = set()
        for task in tasks:
            pending.add(self._submit(function, task, arrived))
            while len(pending) >= _TASKS_PER_THREAD * max(self._count_threads(), 1):
                yield self._next(arrived, pending)
        while pending:
            yield self._next(arrived, pending)

    def _submit(self, function: Callable[[Task], Result], task: Task, arrived: SimpleQueue[Any]) -> Any:
        self._number += 1
        key = f"shardclip-{function.__name__}-{self._run}-{self._number}"
        sealed = self._seal(function, absolute(task))
        future = _speak(lambda: self._client.submit(run_sealed, sealed, key=key, pure=False))
        future.add_done_callback(arrived.put)
        return future

    def _seal(self, function: Callable[[Task], Result], task: Task) -> Sealed:
        return Sealed(Errand(surroundings=self._surroundings, function=function, task=task))

    def _next(self, arrived: SimpleQueue[Any], pending: set[Any]) -> Any:
        """The result of the next task that is done."""
        while True:
            with contextlib.suppress(Empty):
                future = arrived.get(timeout=_ASK_EVERY_S)
                pending.remove(future)
                return _unseal(_speak(partial(future.result, timeout=self._wait)))
            self._count_threads()

    def _count_threads(self) -> int:
        """Threads of the cluster, lately; 0 while there are none. InputError where that lasts."""
        now = time.monotonic()
        if now - self._asked >= _ASK_EVERY_S or not self._threads:
            ask = self._client.scheduler.ncores
            self._threads = sum(_speak(lambda: self._client.sync(ask, callback_timeout=self._wait)).values())
            self._asked = now
        if self._threads:
            self._manned = now
        elif now - self._manned > self._wait:
            raise InputError(
                f"the Dask scheduler has had no worker for {self._wait:g} s (--scheduler-wait); start some and run the "
                "command again to go on"
            )
        return self._threads


@contextlib.contextmanager
def open_cluster(scheduler: str, wait: float, sources: Sequence[SourceConfig], work: Path) -> Iterator[Cluster]:
    """Connect and check every worker. InputError where there is no scheduler, no worker, or one that does not fit.

    `scheduler` is an address or a scheduler file, `work` the folder of what is being made. Workers that join later
    are checked with their first task.
    """
    try:
        from distributed import Client
    except ImportError:
        raise InputError("--scheduler needs Dask; install shardclip with its extra: shardclip[cluster]") from None
    with _quiet():
        address = _find(scheduler, wait)
        client = _speak(lambda: Client(address, timeout=wait, set_as_default=False))
        try:
            cluster = Cluster(client, Surroundings.here(sources, work), wait)
            cluster.check_workers()
            yield cluster
        finally:
            client.close(timeout=5)  # the scheduler forgets our tasks; those at work end for nothing


def _find(scheduler: str, wait: float) -> str:
    """The address of a Dask scheduler that answers, which may still be starting."""
    deadline = time.monotonic() + wait
    address = _read_address(Path(scheduler), deadline) if scheduler.endswith(".json") else scheduler
    try:
        asyncio.run(_ask_identity(address, max(deadline - time.monotonic(), 1.0)))
    except OSError:  # asyncio's TimeoutError is one
        raise InputError(
            f"no Dask scheduler answers at {address} within {wait:g} s (--scheduler-wait); start it with `dask "
            "scheduler`, or correct the address"
        ) from None
    except (TypeError, ValueError) as error:  # distributed's ways to say that an address or TLS settings are wrong
        raise InputError(f"--scheduler {address} cannot be used ({error})") from None
    return address


def _read_address(path: Path, deadline: float) -> str:
    while True:
        with contextlib.suppress(FileNotFoundError, ValueError):  # not there yet, or half written
            content = json.loads(path.read_bytes())
            if isinstance(content, dict) and isinstance(content.get("address"), str):
                return content["address"]
        if time.monotonic() > deadline:
            raise InputError(f"{path} is not there or holds no address; `dask scheduler --scheduler-file` writes it")
        time.sleep(0.2)


async def _ask_identity(address: str, wait: float) -> None:
    """Ask before a Client does: one that cannot connect says so at length, and again when it is collected."""
    from distributed import rpc
    from distributed.security import Security

    arguments = Security().get_connection_args("client")
    async with rpc(address, timeout=wait, connection_args=arguments) as scheduler:
        await asyncio.wait_for(scheduler.identity(n_workers=0), wait)


def _speak(question: Callable[[], Result]) -> Result:
    """The cluster's answer; InputError where it has none."""
    from distributed import CancelledError, KilledWorker

    try:
        return question()
    except KilledWorker as error:
        raise InputError(
            f"a task ended {error.allowed_failures + 1} workers (out of memory?); run the command again to go on, with "
            "more memory a worker"
        ) from None
    except (OSError, CancelledError):
        raise InputError("the Dask scheduler is lost; start it and run the command again to go on") from None
    except Exception as error:
        raise _cannot_run(error) from None


def _cannot_run(error: BaseException) -> InputError:
    """No message of the error: it may quote what a task holds."""
    return InputError(
        f"the cluster cannot run our tasks ({type(error).__name__}); start scheduler and workers from the environment "
        "that runs the ingest"
    )


def _unseal(sealed: Sealed) -> Any:
    """A task's result; raises what the task raised."""
    result = sealed.open()
    if isinstance(result, Failure):
        raise result.error
    return result


def absolute(value: Any) -> Any:
    """The same task with absolute paths: a worker has a working folder of its own."""
    if isinstance(value, Path):
        return value.absolute()
    if type(value) is tuple:
        return tuple(map(absolute, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: absolute(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep distributed from telling in pages what we tell in one line."""
    import dask

    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB"}):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
