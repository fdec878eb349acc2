"""Signs of life: a rank that was stopped, or whose node is gone, ends the job instead of keeping it waiting.

A rank that dies closes its connections, which the others see at once. One that hangs (SIGSTOP, a machine that swaps or
lost its network) does not, and collectives wait for it for minutes. So a thread of each rank counts upwards in
torchrun's store, rank 0's reads all counts and the others' read rank 0's; a count that stands still for the timeout, by
our own monotonic clock, ends the process. A long validation, a slow save or a wait for data stop no such thread, so
they may take as long as they like; a loader that waits for ever has limits of its own.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from train.ranks import Ranks, connect, first_to_tell

BEATS = 10
"""Beats within the timeout."""
_GOODBYE = "goodbye"


@contextlib.contextmanager
def watching(ranks: Ranks, timeout_s: float) -> Iterator[None]:
    """Watch the other ranks inside the block; end this process by exit code 1 where one stays silent for `timeout_s`.

    All ranks have to call it. With one rank, or a timeout of 0, nothing is watched.
    """
    if ranks.size == 1 or not timeout_s:
        yield
        return
    watch = Watch(ranks, timeout_s, connect(timeout_s))
    ranks.barrier()  # all counts are there
    watch.start()
    try:
        yield
    finally:
        watch.stop()


class Watch:
    """One rank's beats, and its eyes on the others'."""

    def __init__(self, ranks: Ranks, timeout_s: float, store: dist.Store) -> None:
        self._ranks, self._timeout_s, self._store = ranks, timeout_s, store
        self._others = list(range(1, ranks.size)) if ranks.first else [0]
        self._counts: dict[int, bytes] = {}
        self._heard: dict[int, float] = {}
        self._answered = 0.0
        self._done = threading.Event()
        # Two, because a store whose machine has stopped may keep the one that asks waiting.
        self._threads = [
            threading.Thread(target=work, name="signs-of-life", daemon=True) for work in (self._exchange, self._judge)
        ]
        self._beat(0)

    def start(self) -> None:
        """Begin to beat and to look."""
        self._answered = time.monotonic()
        self._heard = dict.fromkeys(self._others, self._answered)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Say goodbye, so that nobody waits for the next beat."""
        self._done.set()
        faulthandler.cancel_dump_traceback_later()
        self._threads[0].join(self._timeout_s)
        with contextlib.suppress(RuntimeError):  # rank 0's machine has gone first
            self._store.set(str(self._ranks.rank), _GOODBYE)

    def _exchange(self) -> None:
        """Beat, and note whose count has changed."""
        number, names = 0, [str(rank) for rank in self._others]
        with contextlib.suppress(RuntimeError):  # the store has gone, with the first node's torchrun
            while not self._done.wait(self._timeout_s / BEATS):
                number += 1
                self._beat(number)
                counts, self._answered = self._store.multi_get(names), time.monotonic()
                for rank, count in zip(self._others, counts, strict=True):
                    if count != self._counts.get(rank) or count == _GOODBYE.encode():
                        self._counts[rank], self._heard[rank] = count, self._answered

    def _beat(self, number: int) -> None:
        self._store.set(str(self._ranks.rank), str(number))

    def _judge(self) -> None:
        """End the process where somebody has been silent for too long."""
        while not self._done.wait(self._timeout_s / BEATS):
            # Were even this thread held up, by a lock that is never given back, the process would end too.
            faulthandler.dump_traceback_later(2 * self._timeout_s, exit=True)
            due = time.monotonic() - self._timeout_s
            silent = [rank for rank, heard in self._heard.items() if heard < due]
            if silent and not self._done.is_set():
                self._end(silent, ask=self._answered >= due)

    def _end(self, silent: Sequence[int], *, ask: bool) -> None:
        """Say why, once in the whole job, and leave at once: the main thread may be waiting for ever."""
        # A store that has just stopped answers neither the other thread nor this one, each for the timeout.
        faulthandler.dump_traceback_later(4 * self._timeout_s, exit=True)
        if not ask or first_to_tell(self._store):
            names = ", ".join(map(str, silent))
            sys.stderr.write(
                f"train.main: no sign of life from rank {names} for {self._timeout_s:.0f} s: stopped, or its machine "
                "is gone; this run ends. Go on with --resume auto (see --rank-timeout-s)\n"
            )
            sys.stderr.flush()
        os._exit(1)
