"""A file of which only what is asked for is in memory, at its place: one read for what pyarrow would read in ten.

pyarrow reads a row group column by column, page header by page header. On a file system that takes milliseconds to
answer, one read of all that is wanted, and pyarrow on memory, takes a tenth of the time. The memory is anonymous: no
file is mapped, so that one that shrinks is an error and no SIGBUS, and pages that nothing was read into cost nothing.
"""

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

Span = tuple[int, int]
"""First byte, and the byte after the last."""
GAP = 256 << 10
"""Bytes between two spans below which they are read as one: less than a request to a far disk costs."""


class PartialFile:
    """An open file. Not locked: `holding` is for one thread at a time, `read` for any."""

    def __init__(self, path: Path, size: int) -> None:
        """`size`: bytes of the file. OSError where it cannot be opened."""
        self._memory = mmap.mmap(-1, max(size, 1))
        # Not blocking: the file may have become a pipe since it was checked, whose opening might never end.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.buffer = pa.py_buffer(self._memory)
        """As long as the file; zeros but for what is held."""

    def read(self, spans: Iterable[Span]) -> list[tuple[int, bytes]]:
        """The bytes of spans, near ones together, each with its place. OSError, or EOFError where the file ends."""
        return [(start, self._read(start, end)) for start, end in _together(spans)]

    @contextmanager
    def holding(self, parts: list[tuple[int, bytes]]) -> Iterator[None]:
        """Inside the block, what was read is in `buffer`."""
        try:
            for start, content in parts:
                self._memory[start : start + len(content)] = content
            yield
        finally:
            self._memory.madvise(mmap.MADV_DONTNEED)

    def held(self, size: int, offset: int) -> bytes:
        """Bytes of what is held."""
        return self._memory[offset : offset + size]

    def close(self) -> None:
        """Close the file; the memory goes when pyarrow lets go of it."""
        os.close(self._fd)

    def _read(self, start: int, end: int) -> bytes:
        pieces = []
        while start < end:
            piece = os.pread(self._fd, end - start, start)
            if not piece:
                raise EOFError(f"it ends at byte {start:,}")
            pieces.append(piece)
            start += len(piece)
        return b"".join(pieces)


def _together(spans: Iterable[Span]) -> Iterator[Span]:
    """Spans in order of place, those with less than GAP between them as one."""
    start = end = -1
    for first, last in sorted(spans):
        if start >= 0 and first - end <= GAP:
            end = max(end, last)
            continue
        if start >= 0:
            yield start, end
        start, end = first, last
    if start >= 0:
        yield start, end
