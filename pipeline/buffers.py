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
from shards.schema import ShardInfo

PAGE = 4096
"""Buffers are whole pages."""
HOLES = 9
"""One part in so many is not given out, as between buffers there are holes too small for the next."""
MOST_MEMORY = 288 << 20
"""Bytes for encoded blocks unless more is asked for, or needed."""
PART_BYTES = 512 << 10
"""Of the images of a visit about as many lie in one buffer, which is free again as soon as they are used."""
AHEAD_BYTES = 8 << 20
"""Of those, for visits that nobody needs yet, unless threads need more to be at work all the time, a block each."""


class Buffers:
    """Memory with a limit, given out by first fit. Not locked: BlockReader calls it under its own lock."""

    def __init__(self, memory: int) -> None:
        """`memory`: bytes of it. InputError for more than there is."""
        self.limit = memory - memory // HOLES
        """Bytes that should be out at once."""
        self.used = self.total = 0
        """Bytes that are out, and the most memory that they took, with the holes between them."""
        self._top = self._apart = 0
        size = memory // PAGE * PAGE
        self._holes = [(0, size)]
        try:
            self._memory = np.empty(size, dtype=np.uint8)
        except MemoryError:
            raise InputError(
                f"{memory >> 20:,} MiB for encoded blocks are more than this machine has; lower memory_mb or use fewer "
                "streams"
            ) from None

    def fits(self, size: int) -> bool:
        """Whether a hole is large enough for a buffer."""
        return self._find(size) is not None

    def take(self, size: int) -> NDArray[np.uint8]:
        """A buffer of at least `size` bytes; one of its own where no hole is large enough."""
        size = -(-size // PAGE) * PAGE
        self.used += size
        number = self._find(size)
        if number is None:
            self._apart += size
            buffer = np.empty(size, dtype=np.uint8)
        else:
            begin, end = self._holes[number]
            self._holes[number : number + 1] = [(begin + size, end)] if end - begin > size else []
            self._top = max(self._top, begin + size)
            buffer = self._memory[begin : begin + size]
        self.total = max(self.total, self._top + self._apart)
        return buffer

    def _find(self, size: int) -> int | None:
        """Number of the first hole that is large enough."""
        return next((number for number, (begin, end) in enumerate(self._holes) if end - begin >= size), None)

    def give(self, buffer: NDArray[np.uint8]) -> None:
        """Take a buffer back."""
        self.used -= buffer.nbytes
        if buffer.base is not self._memory:
            self._apart -= buffer.nbytes
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


def memory_for(sets: Sequence[ShardSet], live: Sequence[tuple[int, int]], threads: int, asked: int | None) -> int:
    """Bytes for encoded blocks: those asked for, or what reading needs not to wait for memory, MOST_MEMORY at most; but
    never less than what is left and a block take, without which InputError.

    All of it is reckoned from means, so it bounds what is read ahead, not what is needed now: a visit that the consumer
    waits for lies apart where no hole takes it. Little above the least that is half as much again (5.1 MiB seen of
    3.5), at the very most a block for each stream; `Buffers.total` counts it.

    `live`: streams that each set has on this rank, and the rows that are left of their visits, see `Order.live`. Of a
    part that is used in part half is left besides. Then there are the streams' next visits, some for each thread, or
    few: reading on would only take memory from others.
    """
    left = most = 0.0
    for each, (streams, rows) in zip(sets, live, strict=True):
        row = max(shard.tar.bytes / shard.rows for shard in each.shards)
        block = each.layout.block_rows * row
        left += min(rows * row + min(rows * row, streams * PART_BYTES / 2), streams * block)
        most = max(most, block)
    count = sum(streams for streams, _ in live)
    if asked is not None and left + most > asked:
        raise InputError(
            f"memory_mb {asked >> 20} is too little: the {count} streams of this rank hold {left / 2**20:.1f} MiB, "
            f"and a block ahead takes {most / 2**20:.1f} MiB; raise memory_mb or use fewer streams"
        )
    ahead = min((count + 4 * threads) * most, max(AHEAD_BYTES, threads * most))
    with_holes = HOLES / (HOLES - 1)
    return asked or max(int((left + most) * with_holes), min(int((left + ahead) * with_holes), MOST_MEMORY))
