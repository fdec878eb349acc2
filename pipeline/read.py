"""Read a range of a tar into a buffer: retry what passes, name what does not, notice a file that changes under us.

`preadv`, never mmap: a mapped file that shrinks kills the process with SIGBUS. An open file that is deleted, renamed or
replaced is read to its end as it was; whatever is opened later has to be what the manifest says, sizes and digests.
"""

import errno
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.stall import Busy
from shards.errors import InputError
from shards.reader import Rows, ShardReader

Result = TypeVar("Result")

TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EREMOTEIO})
"""Errors of a network file system that often pass."""
BACKOFF_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Pauses before the second and later attempts."""
MOST_PARTS = os.sysconf("SC_IOV_MAX")
"""Pieces of memory that one read takes."""


@dataclass(slots=True)
class ReadStats:
    """Counts of one reader, added up by its threads under a lock."""

    bytes: int = 0
    blocks: int = 0
    retries: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, *, bytes: int = 0, blocks: int = 0, retries: int = 0) -> None:
        """Add to the counts."""
        with self.lock:
            self.bytes += bytes
            self.blocks += blocks
            self.retries += retries


def retried(action: Callable[[], Result], stats: ReadStats, mend: Callable[[int], None] | None = None) -> Result:
    """What `action` returns, tried again, and counted, while it fails with what often passes.

    `mend` is called with the error's number before each further try.
    """
    for pause in BACKOFF_S:
        try:
            return action()
        except (OSError, InputError) as error:
            number = _transient(error)
            if number is None:
                raise
        stats.add(retries=1)
        time.sleep(pause)
        if mend is not None:
            mend(number)
    return action()


def _transient(error: BaseException) -> int | None:
    """The number of an error that often passes, also where an InputError was made of it."""
    cause = error if isinstance(error, OSError) else error.__context__
    return cause.errno if isinstance(cause, OSError) and cause.errno in TRANSIENT else None


Piece = tuple[int, NDArray[np.uint8]]
"""Offset in the tar, and the memory for what begins there. Several are in the order of the tar and do not overlap."""


class OpenShard:
    """One shard in use: its table rows and its image bytes, both retried. Shared by the reading threads."""

    def __init__(
        self, open_reader: Callable[[], ShardReader], stats: ReadStats, busy: Busy, *, staged: bool = False
    ) -> None:
        """`open_reader` opens the shard, now and where a handle goes stale."""
        self.staged = staged
        """Whether this is a copy on the node, which the shared folder can stand in for."""
        self._open_reader, self._stats, self._busy = open_reader, stats, busy
        self._reader = retried(open_reader, stats)
        self._stale: list[ShardReader] = []
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Name of the shard."""
        return self._reader.info.name

    def read_rows(self, block: int) -> Rows:
        """Rows of a block."""

        def attempt() -> Rows:
            return self._reader.read_rows(block)

        with self._busy.doing(f"at {self.name}.parquet, block {block},"):
            return retried(attempt, self._stats, self._mend)

    def read_into(self, pieces: Sequence[Piece]) -> None:
        """Fill pieces of memory with the tar's bytes, in one request. InputError, with the reason, where that cannot
        be done."""
        parts, offset, done = _parts(pieces), pieces[0][0], 0
        size = pieces[-1][0] + len(pieces[-1][1]) - offset

        def attempt() -> None:
            nonlocal done
            while done < size:
                count = os.preadv(self._reader.fd, _behind(parts, done), offset + done)
                if not count:
                    raise self._changed()
                done += count

        with self._busy.doing(f"at {self.name}.tar, {size:,} bytes at offset {offset},"):
            try:
                retried(attempt, self._stats, self._mend)
            except OSError as error:
                raise self._unreadable(offset, size, error) from None
        self._check_size()
        self._stats.add(bytes=size)

    def reread(self, image: NDArray[np.uint8], offset: int) -> None:
        """Read an image's bytes once more, from the disk rather than the page cache where the system allows it."""
        os.posix_fadvise(self._reader.fd, offset, len(image), os.POSIX_FADV_DONTNEED)
        self._stats.add(retries=1)
        self.read_into([(offset, image)])

    def close_stale(self) -> None:
        """Close the files that were opened anew. Nobody may be reading."""
        while self._stale:
            self._stale.pop().close()

    def close(self) -> None:
        """Close the files. Nobody may be reading."""
        self.close_stale()
        self._reader.close()

    def _mend(self, number: int) -> None:
        """A stale handle stays stale: open the shard anew, as the one that the manifest describes or not at all."""
        if number != errno.ESTALE:
            return
        try:
            fresh = self._open_reader()
        except (InputError, OSError) as error:
            if _transient(error) is None:
                raise
            return  # the next try says so
        with self._lock:
            # Another thread may be reading from the old one.
            self._stale.append(self._reader)
            self._reader = fresh

    def _check_size(self) -> None:
        if os.fstat(self._reader.fd).st_size != self._reader.info.tar.bytes:
            raise self._changed()

    def _changed(self) -> InputError:
        size = os.fstat(self._reader.fd).st_size
        return InputError(
            f"shard {self.name}: {self.name}.tar changed while in use, from {self._reader.info.tar.bytes:,} "
            f"to {size:,} bytes; restore it or ingest again"
        )

    def _unreadable(self, offset: int, size: int, error: OSError) -> InputError:
        tries = f"{len(BACKOFF_S) + 1} times: " if _transient(error) is not None else ""
        return InputError(
            f"shard {self.name}: cannot read {size:,} bytes at offset {offset} ({tries}{error.strerror}); "
            "check the file system"
        )


_UNWANTED = memoryview(bytearray(256 << 10))
"""Where bytes go that nobody looks at: small, so that it stays in the core's cache."""


def _parts(pieces: Sequence[Piece]) -> list[memoryview]:
    """Where the bytes of a request go, one after the other."""
    parts: list[memoryview] = []
    end = pieces[0][0]
    for begin, memory in pieces:
        while end < begin:
            parts.append(_UNWANTED[: begin - end])
            end += len(parts[-1])
        parts.append(memory.data)
        end = begin + len(memory)
    return parts


def _behind(parts: list[memoryview], done: int) -> list[memoryview]:
    """What is left of them after so many bytes, at most as many as one call takes."""
    if done:
        ends = list(accumulate(map(len, parts)))
        first = bisect_right(ends, done)
        parts = [parts[first][done - ends[first] :], *parts[first + 1 :]]
    return parts[:MOST_PARTS]
