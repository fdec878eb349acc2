"""Memory for encoded blocks: how much it has to be, and buffers that are used again.

Fresh memory costs more than the reading, page by page.
"""

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError
from shards.schema import Manifest, ShardInfo

ROUND = 64 << 10
"""Buffers are this many bytes, times a whole number, so that blocks of about one size share them."""
MOST_MEMORY = 256 << 20
"""Bytes that are read ahead unless more is asked for."""


class Buffers:
    """A pool with a limit. Not locked: BlockReader calls it under its own lock."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = self.used = 0
        """Bytes in all buffers, and in those that are out."""
        self._free: dict[int, list[NDArray[np.uint8]]] = {}

    def take(self, size: int) -> NDArray[np.uint8]:
        """A buffer of at least `size` bytes: the smallest free one that will do, else a new one."""
        fitting = min((bytes for bytes, free in self._free.items() if free and bytes >= size), default=None)
        if fitting is None:
            buffer = np.empty(-(-size // ROUND) * ROUND, dtype=np.uint8)
            self.total += buffer.nbytes
            self._trim()
        else:
            buffer = self._free[fitting].pop()
        self.used += buffer.nbytes
        return buffer

    def give(self, buffer: NDArray[np.uint8]) -> None:
        """Take a buffer back."""
        self.used -= buffer.nbytes
        self._free.setdefault(buffer.nbytes, []).append(buffer)
        self._trim()

    def _trim(self) -> None:
        """Drop the smallest free buffers while there is more than the limit."""
        while self.total > self.limit and (
            smallest := min((size for size in self._free if self._free[size]), default=0)
        ):
            self._free[smallest].pop()
            self.total -= smallest


def block_bytes(manifest: Manifest, shard: ShardInfo) -> int:
    """About how many bytes of the tar one block takes: a tenth over the shard's mean."""
    rows = min(manifest.block_rows, shard.rows)
    return int(1.1 * shard.tar.bytes * rows / shard.rows)


def read_ahead(manifest: Manifest, shards: tuple[ShardInfo, ...], streams: int, threads: int) -> int:
    """Bytes that reading needs not to wait for memory: each stream's block and its next, and four for each thread.

    Reading on would only take memory from others, 256 MiB at the most.
    """
    block = max(block_bytes(manifest, shard) for shard in shards)
    return min((2 * streams + 4 * threads) * block, MOST_MEMORY)


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
