"""Read a range of a tar into a buffer: retry what passes, name what does not, notice a file that changes under us.

`preadv`, never mmap: a mapped file that shrinks kills the process with SIGBUS.
"""

import errno
import os
import threading
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from shards.errors import InputError
from shards.reader import Rows, ShardReader

TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR})
"""Errors of a network file system that often pass."""
BACKOFF_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Pauses before the second and later attempts."""


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


class OpenShard:
    """One shard in use: its table rows and its image bytes, both retried. Shared by the reading threads."""

    def __init__(self, reader: ShardReader, stats: ReadStats) -> None:
        self._reader = reader
        self._stats = stats
        self._table_lock = threading.Lock()

    @property
    def name(self) -> str:
        """Name of the shard."""
        return self._reader.info.name

    def read_rows(self, block: int) -> Rows:
        """Rows of a block. One thread at a time: a ParquetFile is not safe to share."""
        for pause in (*BACKOFF_S, None):
            try:
                with self._table_lock:
                    return self._reader.read_rows(block)
            except InputError as error:
                if pause is None or not _is_transient(error.__context__):
                    raise
            self._pause(pause)
        raise AssertionError("unreachable")

    def read_into(self, buffer: NDArray[np.uint8], offset: int) -> None:
        """Fill a buffer from the tar's bytes at an offset. InputError where that cannot be done, with the reason."""
        view, done = buffer.data, 0
        for pause in (*BACKOFF_S, None):
            try:
                while done < len(view):
                    count = os.preadv(self._reader.fd, [view[done:]], offset + done)
                    if not count:
                        raise self._changed()
                    done += count
                break
            except OSError as error:
                if pause is None or not _is_transient(error):
                    raise self._unreadable(offset, len(view), error) from None
                stale = error.errno == errno.ESTALE
            self._pause(pause)
            if stale:
                self._reopen()
        self._check_size()
        self._stats.add(bytes=len(view), blocks=1)

    def check_image(self, image: NDArray[np.uint8], rows: Rows, row: int) -> None:
        """InputError, naming shard, key and offset, where an image's bytes are not those that ingest wrote."""
        if xxh3_64_intdigest(image.data) != int(rows.xxh3[row]):
            raise InputError(
                f"shard {self.name}: image {rows.keys()[row]} at offset {int(rows.offset[row])} "
                f"({int(rows.size[row])} bytes) is damaged: its xxh3 differs; find all damage with "
                "python -m shards verify, then restore the shard or ingest again"
            )

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def _pause(self, seconds: float | None) -> None:
        self._stats.add(retries=1)
        time.sleep(seconds or 0)

    def _reopen(self) -> None:
        """Get a fresh handle under the same number, as ESTALE asks for; where that fails, the next read says so."""
        try:
            fresh = os.open(self._reader.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        os.dup2(fresh, self._reader.fd, inheritable=False)
        os.close(fresh)

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
        tries = f"{len(BACKOFF_S) + 1} times: " if _is_transient(error) else ""
        return InputError(
            f"shard {self.name}: cannot read {size:,} bytes at offset {offset} ({tries}{error.strerror}); "
            "check the file system"
        )


def _is_transient(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in TRANSIENT
