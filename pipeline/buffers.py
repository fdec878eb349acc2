"""Byte buffers that are used again: fresh memory costs more than the reading, page by page."""

import numpy as np
from numpy.typing import NDArray

ROUND = 64 << 10
"""Buffers are this many bytes, times a whole number, so that blocks of about one size share them."""


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
