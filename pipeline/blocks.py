"""Read blocks ahead: threads load whole visits, in the order of need, into reused buffers within a memory limit.

    visits -> (claim, when memory allows) -> rows, bytes, xxh3 -> handed out in order -> released, buffer reused

A visit that the consumer waits for is always admitted, whatever the limit, so the limit can delay but never block.
"""

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.handles import OpenShards
from pipeline.order import Visit
from pipeline.read import ReadStats
from shards.errors import InputError
from shards.reader import Rows
from shards.schema import Manifest, ShardInfo

READ_THREADS = 4
"""Enough to keep several requests on the way to a parallel file system; they cost next to no CPU."""
ROUND = 64 << 10
"""Buffers are this many bytes, times a whole number, so that blocks of about one size share them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A visit with its data, all in its order of use. The images are views of a buffer: release it after use."""

    visit: Visit
    images: list[NDArray[np.uint8]]
    """n encoded images."""
    rows: Rows
    """Their rows."""
    shard_rows: NDArray[np.int64]
    """(n,) their rows in the shard."""
    buffer: NDArray[np.uint8]


class Buffers:
    """Byte buffers that are used again. Not locked: BlockReader calls it under its own lock."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self._free: list[NDArray[np.uint8]] = []

    @property
    def used(self) -> int:
        """Bytes in buffers that are out."""
        return self.total - sum(buffer.nbytes for buffer in self._free)

    def take(self, size: int) -> NDArray[np.uint8]:
        """A buffer of at least `size` bytes: the smallest free one that will do, else a new one."""
        fitting = [buffer for buffer in self._free if buffer.nbytes >= size]
        if fitting:
            chosen = min(fitting, key=lambda buffer: buffer.nbytes)
            self._free = [buffer for buffer in self._free if buffer is not chosen]
            return chosen
        fresh = np.empty(-(-size // ROUND) * ROUND, dtype=np.uint8)
        self.total += fresh.nbytes
        self._trim()
        return fresh

    def give(self, buffer: NDArray[np.uint8]) -> None:
        """Take a buffer back."""
        self._free.append(buffer)
        self._trim()

    def _trim(self) -> None:
        """Drop the smallest free buffers while there is more than the limit."""
        self._free.sort(key=lambda buffer: -buffer.nbytes)
        while self._free and self.total > self.limit:
            self.total -= self._free.pop().nbytes


class _Slot:
    """A visit on its way: planned, then claimed by a thread, then done or failed."""

    def __init__(self, visit: Visit, estimate: int) -> None:
        self.visit = visit
        self.estimate = estimate
        self.claimed = False
        self.result: Loaded | BaseException | None = None


class BlockReader:
    """Hands out the visits of an iterator in its order, read ahead by threads. One consumer."""

    def __init__(
        self, root: Path, manifest: Manifest, shards: tuple[ShardInfo, ...], visits: Iterator[Visit], memory: int
    ) -> None:
        self._shards = OpenShards(root, manifest, shards)
        self._manifest, self._infos, self._visits = manifest, shards, visits
        self._slots: deque[_Slot] = deque()
        self._buffers = Buffers(memory)
        self._pending = 0
        self._waiting = self._ended = self._closed = self._failed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"shardclip-read-{number}", daemon=True)
            for number in range(READ_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def stats(self) -> ReadStats:
        """What was read so far."""
        return self._shards.stats

    @property
    def buffer_bytes(self) -> int:
        """Bytes in all buffers, free ones included."""
        return self._buffers.total

    def next_first(self) -> int | None:
        """First position of the visit that `get` hands out next; None after the last."""
        with self._changed:
            self._plan_until(1)
            return self._slots[0].visit.first if self._slots else None

    def get(self) -> Loaded:
        """The next visit, waited for. Raises what its reading raised."""
        with self._changed:
            self._plan_until(1)
            slot = self._slots[0]
            self._waiting = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: slot.result is not None or self._closed)
            self._waiting = False
            if isinstance(slot.result, BaseException):
                raise slot.result
            if slot.result is None:
                raise RuntimeError("the block reader was closed")
            self._slots.popleft()
            return slot.result

    def release(self, loaded: Loaded) -> None:
        """Give the buffer of a visit back; its images are no longer valid."""
        self._give(loaded.buffer)

    def stop(self) -> None:
        """Begin to close: whoever waits in `get` is let go with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the threads and close the files."""
        self.stop()
        for thread in self._threads:
            thread.join()
        self._shards.close()

    def _work(self) -> None:
        while (slot := self._claim()) is not None:
            try:
                result: Loaded | BaseException = self._load(slot)
            except BaseException as error:  # handed to the consumer, who raises it
                result = error
            with self._changed:
                slot.result = result
                self._failed |= isinstance(result, BaseException)
                self._changed.notify_all()

    def _claim(self) -> _Slot | None:
        with self._changed:
            while not (self._closed or self._failed):
                slot = next((slot for slot in self._slots if not slot.claimed), None) or self._plan()
                if slot is not None and self._admit(slot):
                    slot.claimed = True
                    self._pending += slot.estimate
                    return slot
                self._changed.wait()
            return None

    def _admit(self, slot: _Slot) -> bool:
        wanted_now = self._waiting and slot is self._slots[0]
        return wanted_now or self._buffers.used + self._pending + slot.estimate <= self._buffers.limit

    def _plan(self) -> _Slot | None:
        if self._ended:
            return None
        visit = next(self._visits, None)
        if visit is None:
            self._ended = True
            return None
        self._slots.append(_Slot(visit, block_bytes(self._manifest, self._infos[visit.shard])))
        return self._slots[-1]

    def _plan_until(self, count: int) -> None:
        while len(self._slots) < count and self._plan() is not None:
            pass

    def _load(self, slot: _Slot) -> Loaded:
        visit = slot.visit
        try:
            with self._shards.use(visit.shard) as shard:
                rows = pick_rows(self._shards.rows(shard, visit.shard, visit.block), visit.rows)
                begin, end = int(rows.offset.min()), int((rows.offset + rows.size).max())
                buffer = self._take(slot, end - begin)
                try:
                    shard.read_into(buffer[: end - begin], begin)
                    images = _views(buffer, rows.offset - begin, rows.size)
                    for row, image in enumerate(images):
                        shard.check_image(image, rows, row)
                except BaseException:
                    self._give(buffer)
                    raise
        finally:
            self._forget_estimate(slot)
        shard_rows = visit.rows + visit.block * self._manifest.block_rows
        return Loaded(visit=visit, images=images, rows=rows, shard_rows=shard_rows, buffer=buffer)

    def _take(self, slot: _Slot, size: int) -> NDArray[np.uint8]:
        """A buffer for a visit, whose true size now stands for the estimate."""
        with self._changed:
            self._pending -= slot.estimate
            slot.estimate = 0
            return self._buffers.take(size)

    def _give(self, buffer: NDArray[np.uint8]) -> None:
        with self._changed:
            self._buffers.give(buffer)
            self._changed.notify_all()

    def _forget_estimate(self, slot: _Slot) -> None:
        """Where reading failed before it took a buffer."""
        with self._changed:
            self._pending -= slot.estimate
            slot.estimate = 0


def block_bytes(manifest: Manifest, shard: ShardInfo) -> int:
    """About how many bytes of the tar one block takes: a tenth over the shard's mean."""
    rows = min(manifest.block_rows, shard.rows)
    return int(1.1 * shard.tar.bytes * rows / shard.rows)


def check_memory(manifest: Manifest, shards: tuple[ShardInfo, ...], memory: int, streams: int) -> None:
    """InputError where `streams` live blocks and one being read do not fit `memory` bytes."""
    block = max(block_bytes(manifest, shard) for shard in shards)
    blocks = min(streams, sum(shard.rows for shard in shards)) + 1
    if blocks * block > memory:
        raise InputError(
            f"memory_mb {memory >> 20} is too little: {blocks - 1} streams of this rank and one block ahead are "
            f"{blocks} x {block / 2**20:.1f} MiB = {blocks * block / 2**20:.1f} MiB; "
            "raise memory_mb or use fewer streams"
        )


def pick_rows(rows: Rows, chosen: NDArray[np.int64]) -> Rows:
    """The chosen rows, in the order of `chosen`."""
    fields = {name: getattr(rows, name)[chosen] for name in Rows.__slots__}
    return replace(rows, **fields)


def _views(buffer: NDArray[np.uint8], offset: NDArray[np.int64], size: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    ends = (offset + size).tolist()
    return [buffer[begin:end] for begin, end in zip(offset.tolist(), ends, strict=True)]
