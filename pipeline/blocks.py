"""Read blocks ahead: threads load whole visits, in the order of need, into reused buffers within a memory limit.

    visits -> (claim, when memory allows) -> rows, bytes, xxh3 -> handed out in order -> released, buffer reused

A visit that the consumer waits for is always admitted, and lies apart where no hole is large enough, so the limit can
delay but never block. Who waits keeps the time (`stall`): a read that hangs is named, and given up at a limit; its
thread is then left behind.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline import stall
from pipeline.buffers import Buffers, row_bytes
from pipeline.order import Visit
from pipeline.visits import Loaded, VisitLoader

CLOSE_WAIT_S = 10.0
"""Seconds that closing waits for reads under way; those that take longer are left behind, to close the files."""

KEEPS_UP = 8
"""One part in so many of the memory may be free, for each thread that is awake, before one more is woken."""
LEAST = 8
"""Visits ahead of the consumer, fewer of which wake a thread."""
STARVES_S = 0.05
"""Seconds that the consumer waits for one visit before all threads are woken."""


class _Slot:
    """A visit on its way: planned, then claimed by a thread, then done or failed. Its pool is the reader's memory."""

    def __init__(self, reader: "BlockReader", visit: Visit, estimate: int) -> None:
        self._reader, self.visit, self.estimate = reader, visit, estimate
        self.claimed = False
        self.result: list[Loaded] | BaseException | None = None

    def take(self, size: int) -> NDArray[np.uint8]:
        return self._reader._take(self, size)

    def give(self, buffer: NDArray[np.uint8]) -> None:
        self._reader._give([buffer])


class BlockReader:
    """Hands out the visits of an iterator in its order, read ahead by threads. One consumer."""

    def __init__(
        self,
        loader: VisitLoader,
        visits: Iterator[Visit],
        memory: int,
        *,
        threads: int = 4,
        stall_abort_s: float = 0,
    ) -> None:
        """`memory`: bytes for encoded blocks; `stall_abort_s`: longest wait for one visit, 0: no limit."""
        self.loader, self._visits = loader, visits
        self._stall_abort_s = stall_abort_s
        self._slots: deque[_Slot] = deque()
        self._buffers = Buffers(memory)
        self._pending = 0
        self._waiting = self._starved = self._ended = self._closed = self._failed = self._abandoned = False
        self._running = self._awake = threads
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        """What the consumer waits on."""
        self._room = threading.Condition(self._lock)
        """What threads wait on that may claim a visit. See `_wake_another`."""
        self._freed = threading.Condition(self._lock)
        """What threads wait on that have claimed one, for memory."""
        self._threads = [
            threading.Thread(target=self._work, name=f"shardclip-read-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory that buffers took, free ones between them included."""
        return self._buffers.total

    @property
    def held_bytes(self) -> int:
        """Bytes of it that hold visits now, read ahead or in use."""
        return self._buffers.used

    def next_first(self) -> int | None:
        """First position of the visit that `get` hands out next; None after the last."""
        with self._lock:
            return self._slots[0].visit.first if self._slots or self._plan() else None

    def get(self) -> list[Loaded]:
        """The next visit, in parts, waited for. Raises what its reading raised; InputError where it hangs beyond the
        limit."""
        with self._lock:
            if not self._slots:
                self._plan()
            slot = self._slots[0]
            if slot.result is None:
                self._waiting = True
                self._freed.notify_all()
                self._wake_another()
                self._wait(slot)
                self._waiting = self._starved = False
            if isinstance(slot.result, BaseException):
                raise slot.result
            if slot.result is None:
                raise RuntimeError("the block reader was closed")
            self._slots.popleft()
            return slot.result

    def load_one(self, visit: Visit) -> list[Loaded]:
        """A visit out of turn, loaded by the caller's thread; release it too."""
        return self.loader.load(visit, _Slot(self, visit, 0))

    def release(self, loaded: Sequence[Loaded]) -> None:
        """Give the buffers of parts of visits back; their images are no longer valid."""
        if loaded:
            self._give([each.buffer for each in loaded])

    def stop(self) -> None:
        """Begin to close: whoever waits in `get` is let go with an error."""
        with self._lock:
            self._closed = True
            for waited_on in (self._arrived, self._room, self._freed):
                waited_on.notify_all()

    def close(self) -> None:
        """Stop the threads and close the files."""
        self.stop()
        for each in self.loader.shards.sets:
            if each.copies is not None:
                each.copies.close()
        end = time.monotonic() + CLOSE_WAIT_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self._lock:
            self._abandoned = self._running > 0
        if self._abandoned:
            stall.log.warning("left behind: a thread %s", self.loader.shards.busy.longest())
        else:
            self.loader.shards.close()

    def _wait(self, slot: _Slot) -> None:
        self._arrived.wait(STARVES_S)
        if slot.result is not None:
            return
        self._starved = True
        self._wake_another()
        patience = stall.Patience(
            f"shard {self.loader.shards.info(slot.visit.shard).name}", self.loader.shards.busy, self._stall_abort_s
        )
        while slot.result is None and not self._closed:
            self._arrived.wait(stall.TICK_S)
            if slot.result is None:
                patience.look()
        patience.end()

    def _work(self) -> None:
        while (slot := self._claim()) is not None:
            try:
                result: list[Loaded] | BaseException = self._load(slot)
            except BaseException as error:  # handed to the consumer, who raises it
                result = error
            with self._lock:
                slot.result = result
                self._failed |= isinstance(result, BaseException)
                self._arrived.notify()
        with self._lock:
            self._running -= 1
            last = self._abandoned and not self._running
        if last:
            self.loader.shards.close()

    def _claim(self) -> _Slot | None:
        with self._lock:
            while not (self._closed or self._failed):
                last = self._slots[-1] if self._slots else None  # claimed in turn, planned one by one: the others are
                slot = last if last is not None and not last.claimed else self._plan()
                if slot is not None and self._admit(slot):
                    slot.claimed = True
                    self._pending += slot.estimate
                    self._wake_another()
                    return slot
                self._awake -= 1
                self._room.wait()
            return None

    def _wake_another(self) -> None:
        """Where those awake do not keep up: much memory is free, few visits are left, or the consumer waits for long.
        One thread reads from the page cache what two cores decode; more would only take turns. And one that reads a
        dozen visits in one go finds its code in the core's cache."""
        few = not self._awake and len(self._slots) < LEAST
        if self._awake < self._running and (
            few or self._starved or self._has_room((self._awake + 1) * self._buffers.limit // KEEPS_UP)
        ):
            self._awake += 1
            self._room.notify()

    def _admit(self, slot: _Slot) -> bool:
        return self._wanted_now(slot) or self._has_room(slot.estimate)

    def _wanted_now(self, slot: _Slot) -> bool:
        """Whether the consumer does nothing until the visit is there."""
        return self._waiting and slot is self._slots[0]

    def _has_room(self, size: int) -> bool:
        return self._buffers.used + self._pending + size <= self._buffers.limit

    def _plan(self) -> _Slot | None:
        if self._ended:
            return None
        visit = next(self._visits, None)
        if visit is None:
            self._ended = True
            return None
        self._slots.append(_Slot(self, visit, len(visit.rows) * row_bytes(self.loader.shards.info(visit.shard))))
        return self._slots[-1]

    def _load(self, slot: _Slot) -> list[Loaded]:
        try:
            return self.loader.load(slot.visit, slot)
        finally:
            with self._lock:
                self._pending -= slot.estimate
                slot.estimate = 0

    def _take(self, slot: _Slot, size: int) -> NDArray[np.uint8]:
        """A buffer for a visit, whose true size now stands for as much of the estimate."""
        with self._lock:
            while slot.claimed and not (self._buffers.fits(size) or self._wanted_now(slot) or self._closed):
                self._freed.wait()
            planned = min(slot.estimate, size)
            self._pending -= planned
            slot.estimate -= planned
            return self._buffers.take(size)

    def _give(self, buffers: Sequence[NDArray[np.uint8]]) -> None:
        with self._lock:
            for buffer in buffers:
                self._buffers.give(buffer)
            self._freed.notify_all()
            self._wake_another()
