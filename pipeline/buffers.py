"""Memory for encoded blocks: how much it has to be, and one piece of it that is used again and again.

Fresh memory costs more than the reading, page by page, and many buffers of many sizes leave holes between them that a
general allocator keeps. The system gives out what is written to, so that the piece costs what is used of it.
"""

import bisect
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.handles import ShardSet
from shards.errors import InputError
from shards.schema import Manifest, ShardInfo

PAGE = 4096
"""Buffers are whole pages."""
MOST_MEMORY = 256 << 20
"""Bytes that are read ahead unless more is asked for."""
PART_BYTES = 512 << 10
"""Of the images of a visit about as many lie in one buffer, which is free again as soon as they are used."""
AHEAD_BYTES = 12 << 20
"""Of those, for visits that nobody needs yet, unless threads need more to be at work all the time."""


class Buffers:
    """Memory with a limit, given out by first fit. Not locked: BlockReader calls it under its own lock."""

    def __init__(self, limit: int) -> None:
        """InputError for more than there is."""
        self.limit = limit
        self.used = self.total = 0
        """Bytes that are out, and the most that there were from the first to the last of them."""
        self._holes = [(0, limit)]
        try:
            self._memory = np.empty(limit, dtype=np.uint8)
        except MemoryError:
            raise InputError(f"memory_mb {limit >> 20} is more than this machine has; lower it") from None

    def take(self, size: int) -> NDArray[np.uint8]:
        """A buffer of at least `size` bytes; one of its own where no hole is large enough."""
        size = -(-size // PAGE) * PAGE
        self.used += size
        for number, (begin, end) in enumerate(self._holes):
            if end - begin >= size:
                self._holes[number : number + 1] = [(begin + size, end)] if end - begin > size else []
                self.total = max(self.total, begin + size)
                return self._memory[begin : begin + size]
        return np.empty(size, dtype=np.uint8)

    def give(self, buffer: NDArray[np.uint8]) -> None:
        """Take a buffer back."""
        self.used -= buffer.nbytes
        if buffer.base is not self._memory:
            return
        begin = buffer.ctypes.data - self._memory.ctypes.data
        end = begin + buffer.nbytes
        number = bisect.bisect(self._holes, (begin, end))
        if number < len(self._holes) and self._holes[number][0] == end:
            end = self._holes.pop(number)[1]
        if number and self._holes[number - 1][1] == begin:
            number -= 1
            begin = self._holes.pop(number)[0]
        self._holes.insert(number, (begin, end))


def row_bytes(shard: ShardInfo) -> int:
    """About how many bytes of the tar a row takes: a tenth over the mean."""
    return int(1.1 * shard.tar.bytes / shard.rows)


def block_bytes(manifest: Manifest, shard: ShardInfo) -> int:
    """About how many bytes of the tar one block takes."""
    return row_bytes(shard) * min(manifest.block_rows, shard.rows)


def read_ahead(sets: Sequence[ShardSet], live: Sequence[int], threads: int) -> int:
    """Bytes that reading needs not to wait for memory: what is left of each stream's visit, its next, and four for each
    thread.

    `live`: streams that each set has on this rank. Half a visit is left, as a mean over the streams, which are at all
    points of theirs, and half a part that is used in part. A visit is a block but where streams meet in one; then those
    that are live at a time are the longer ones, by a third where all lengths are as frequent. Reading on would only
    take memory from others.
    """
    visits = most = 0.0
    for each, streams in zip(sets, live, strict=True):
        row, layout = max(shard.tar.bytes / shard.rows for shard in each.shards), each.layout
        mean = layout.samples / (layout.blocks + max(streams, 1) - 1)
        visit = min(layout.block_rows, 4 / 3 * mean) * row
        visits += streams * (visit + min(visit, PART_BYTES)) / 2
        most = max(most, layout.block_rows * row)
    ahead = max(AHEAD_BYTES, 2 * threads * most)
    return min(int(visits + min((sum(live) + 4 * threads) * most, ahead)), MOST_MEMORY)


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
