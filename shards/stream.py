"""Large files past the page cache: written by a thread of their own, read in extents by several.

A page that enters the cache costs a virtual machine 0.5 to 10 us (measured: 60 us a film of 24 KB, of the 340 that
encoding it takes), and pushes out what others read. O_DIRECT costs 1 us a film, and waits while others work. Where a
file system does not have it (FUSE, older tmpfs), the same calls go through the cache.
"""

import contextlib
import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from shards.atomic import atomic_file

ALIGNMENT = 4096
"""Addresses, offsets and sizes of direct transfers are multiples of it: of the logical block of any disk."""
_PIECE = 4 << 20
_AHEAD = 3
"""Bytes written at once, and so many buffers of them that wait: the thread has to wait for the interpreter, too."""

_spare: list[mmap.mmap] = []
"""Buffers of files that are finished, for the next: memory that is new costs as much as the cache."""


def new_buffer(size: int) -> mmap.mmap:
    """Memory for direct transfers, in huge pages where there are some: the kernel pins each page of each transfer."""
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


@contextlib.contextmanager
def atomic_stream(path: Path, *, durable: bool = True) -> Iterator["StreamWriter"]:
    """`atomic_file` for a large file that is written in order."""
    with atomic_file(path, durable=durable) as file, StreamWriter(file.fileno()) as stream:
        yield stream


class StreamWriter:
    """Appends to an open file: fills a buffer while a thread writes those before.

    An error of the disk is raised by a later `write`, or by `finish`, without which the file is not whole.
    """

    def __init__(self, handle: int) -> None:
        """`handle`: descriptor of an empty file, opened for writing; stays the caller's."""
        self.handle = handle
        _set_direct(handle, True)
        self._buffer, self._filled = _take(), 0
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[tuple[Future[None], mmap.mmap]] = deque()

    def write(self, content: bytes | memoryview) -> int:
        """Append; returns the number of bytes."""
        rest = memoryview(content)
        while len(rest):
            piece = rest[: _PIECE - self._filled]
            self._buffer[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            rest = rest[len(piece) :]
            if self._filled == _PIECE:
                self._pending.append((self._thread.submit(_write_buffer, self.handle, self._buffer), self._buffer))
                self._buffer, self._filled = self._next(), 0
        return len(content)

    def finish(self) -> None:
        """Write what is left; the descriptor then is an ordinary one."""
        while self._pending:
            _spare.append(self._oldest())
        whole = self._filled - self._filled % ALIGNMENT
        with memoryview(self._buffer) as view:
            _write_all(self.handle, view[:whole])
            _set_direct(self.handle, False)
            _write_all(self.handle, view[whole : self._filled])
        _spare.append(self._buffer)

    def _next(self) -> mmap.mmap:
        return _take() if len(self._pending) < _AHEAD else self._oldest()

    def _oldest(self) -> mmap.mmap:
        """The buffer that was handed over first, once it is written."""
        future, buffer = self._pending.popleft()
        future.result()
        return buffer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.finish()


def _take() -> mmap.mmap:
    try:
        return _spare.pop()
    except IndexError:
        return new_buffer(_PIECE)


def _write_buffer(handle: int, buffer: mmap.mmap) -> None:
    with memoryview(buffer) as view:
        _write_all(handle, view)


def _write_all(handle: int, content: memoryview) -> None:
    refused = False
    while len(content):
        try:
            content = content[os.write(handle, content) :]
        except OSError as error:
            refused = _through_the_cache(handle, error, refused)


def read_extents(path: Path, extents: list[tuple[int, int]], target: memoryview) -> None:
    """Fill `target` with pieces of a file, one behind the other.

    `extents`: offset and size of each, multiples of ALIGNMENT, as is the address of `target`. What lies beyond the end
    of the file stays as it was. OSError where the file cannot be read.
    """
    with open_direct(path) as handle:
        for offset, size in extents:
            read_at(handle, target[:size], offset)
            target = target[size:]


@contextlib.contextmanager
def open_direct(path: Path) -> Iterator[int]:
    """Descriptor of a file that `read_at` reads past the cache. OSError where it cannot be opened."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _set_direct(handle, True)
        yield handle
    finally:
        os.close(handle)


def read_at(handle: int, target: memoryview, offset: int) -> int:
    """Fill `target`; returns the number of bytes, fewer where the file ends. All aligned, as for `read_extents`."""
    done, refused = 0, False
    while done < len(target):
        try:
            size = os.preadv(handle, [target[done:]], offset + done)
        except OSError as error:
            refused = _through_the_cache(handle, error, refused)
            continue
        if not size:
            break
        done += size
    return done


def _through_the_cache(handle: int, error: OSError, refused: bool) -> bool:
    """Switch direct transfers off once a file system refuses one; raises any other error, and a second refusal.

    They may be off by now: several threads' transfers may have been refused at once.
    """
    if error.errno != errno.EINVAL or refused:
        raise error
    _set_direct(handle, False)
    return True


def _set_direct(handle: int, wanted: bool) -> None:
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    with contextlib.suppress(OSError):  # a file system may not have direct transfers
        fcntl.fcntl(handle, fcntl.F_SETFL, (flags | os.O_DIRECT) if wanted else (flags & ~os.O_DIRECT))
