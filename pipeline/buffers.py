"""Byte buffers that are used again: fresh memory costs more than the reading, page by page."""

import numpy as np
from numpy.typing import NDArray

ROUND = 64 << 10
"""Buffers are this many bytes, times a whole number, so that blocks of about one size share them."""


class Buffers:
    """A pool with a limit. Not locked: BlockReader calls it under its own lock."""

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
