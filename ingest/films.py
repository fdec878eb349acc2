"""Films by row, whatever they lie in: HDF5 files one after the other, or image files. Opened in the workers."""

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from ingest.config import SourceConfig
from ingest.h5 import MAX_PIECES
from ingest.images import Fault, read_film
from ingest.source import H5Source
from shards.errors import InputError

Film = NDArray[np.uint8] | Fault
"""(H, W) grey levels, or why there are none."""

READ_ROWS = 32
"""Rows read at once out of HDF5: 13 MB of 320 x 320 float32."""
_READ_BYTES = 32 << 20
"""Bytes from which on fewer rows are read at once: a worker holds up to four such reads."""
_AHEAD = 2
"""Reads under way while rows are used: a parallel file system answers each after milliseconds."""
_MOST_AHEAD = 64 << 20
"""Bytes beyond which rows are not read ahead: a chunk of HDF5's may be large."""

Item = TypeVar("Item")


class H5File(NamedTuple):
    """What a look at an HDF5 file told, which workers need not find out again."""

    rows: int
    film_bytes: int
    """Bytes that a film takes in it on average, compressed or not."""


class H5Films:
    """HDF5 files with one dataset each, seen as one. Height and width are known where they were looked at."""

    height: int
    width: int

    def __init__(self, config: SourceConfig, files: Sequence[H5File] = ()) -> None:
        """`files`: what an earlier look at each told; they are then opened where they are read, and only then: 0.3 ms
        each, for each range of rows.
        """
        self._stack = ExitStack()
        self._config, self._opened = config, dict[int, H5Source]()
        self.files = tuple(files) or self._look()
        self._starts = np.concatenate([[0], np.cumsum([file.rows for file in self.files])])
        self.rows = int(self._starts[-1])

    def _look(self) -> tuple[H5File, ...]:
        """At each file, opened one after the other. InputError where their films differ in size."""
        self._chunks: list[int] = []
        files: list[H5File] = []
        for path in self._config.h5:
            with H5Source(path, self._config.dataset) as part:
                size = part.height, part.width
                if not files:
                    self.height, self.width = size
                if size != (self.height, self.width):
                    raise InputError(
                        f"{path} holds films of {part.height} x {part.width}, {self._config.h5[0]} of {self.height} x "
                        f"{self.width}; a set needs one size, so resize some of them first"
                    )
                files.append(H5File(part.rows, part.stored_bytes // part.rows))
                self._chunks.append(part.chunk_rows)
        return tuple(files)

    def ranges(self, rows: int) -> Iterator[tuple[int, int]]:
        """Cut the rows into ranges of about `rows` that never cut a chunk or span two files: each is read once.

        Only where the files were looked at.
        """
        for start, file, chunk in zip(self._starts.tolist(), self.files, self._chunks, strict=False):
            step = -(-rows // chunk) * chunk
            for first in range(0, file.rows, step):
                yield start + first, start + min(first + step, file.rows)

    def read(self, first: int, end: int, *, ahead: bool = True) -> Iterator[Film]:
        """Films first..end, which lie in one file; each is good until the next is asked for.

        With `ahead`, where the storage makes a read wait, threads read the next rows while these are used.
        """
        number = self._number(first)
        part, start = self._part(number), int(self._starts[number])
        most = min(READ_ROWS, _READ_BYTES // part.row_bytes, MAX_PIECES * part.chunk_rows // part.pieces)
        step = max(most // part.chunk_rows, 1) * part.chunk_rows
        spans = [(row, min(row + step, end - start)) for row in range(first - start, end - start, step)]
        small = step * part.row_bytes <= _MOST_AHEAD
        chunks = _read_spans(part, spans, ahead) if small else (part.read(*span) for span in spans)
        with closing(chunks):  # else its threads would outlive the file where a film is refused
            for (row, _), images in zip(spans, chunks, strict=True):
                yield from part.films(images, row, self._config.value_range)
        part.check_unchanged()

    def stored(self, first: int, end: int) -> NDArray[np.int64]:
        """(end - first,) bytes of films first..end, which lie in one file: compressed or not, its mean."""
        return np.full(end - first, self.files[self._number(first)].film_bytes, dtype=np.int64)

    def stamp(self) -> str:
        """Nothing: that a file changed is told by `ingest.workdir`."""
        return "00" * 16

    def _number(self, row: int) -> int:
        """Of the file that holds a row."""
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _part(self, number: int) -> H5Source:
        if number not in self._opened:
            source = H5Source(self._config.h5[number], self._config.dataset, counted=True)
            self._opened[number] = self._stack.enter_context(source)
            if source.rows != self.files[number].rows:
                raise InputError(
                    f"HDF5 file {number + 1} of {len(self.files)} has {source.rows:,} films, "
                    f"{self.files[number].rows:,} when it was looked at; leave the files alone and ingest again"
                )
        return self._opened[number]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _read_spans(part: H5Source, spans: Sequence[tuple[int, int]], ahead: bool) -> Generator[NDArray]:
    """Spans of rows, one after the other. The first tells whether the page cache holds them and whether storage waits.

    Rows that it does not hold stay out of it where the layout allows: it takes 40 us a film of a CPU, ten times that
    where a virtual machine has to be given the memory first, and 190 GB push out what all others have there. With
    `ahead` threads read them before they are asked for. Others are read ahead only where storage waits: a thread that
    does not would take turns from the one that encodes, 15 % of its films.
    """
    before = _usage()
    first = part.read(*spans[0])
    seconds, cpu, queued, fetched = _usage() - before
    waited, others = seconds - queued > 1.5 * cpu, spans[1:]
    uncached = fetched > first.nbytes / 2
    yield first
    del first  # its memory goes to what is read next
    if others and part.contiguous and (waited or uncached):
        yield from part.read_direct(others, _AHEAD if ahead else 0)
        return
    rows = (part.read(*span) for span in others)
    yield from _ahead(rows) if waited and ahead else rows


def _usage() -> NDArray[np.float64]:
    """What this thread used so far: seconds, of a CPU, and when it could have run but found none free; bytes fetched
    from storage (Linux, Documentation/scheduler/sched-stats and filesystems/proc; a kernel may not count all).
    """
    queued = _proc("schedstat").split()[1:2] or ["0"]
    fetched = [line.split()[1] for line in _proc("io").splitlines() if line.startswith("read_bytes")] or ["0"]
    return np.array([time.perf_counter(), time.thread_time(), float(queued[0]) / 1e9, float(fetched[0])])


def _proc(name: str) -> str:
    try:
        return Path("/proc/thread-self", name).read_text("utf-8")
    except OSError:  # a kernel without them
        return ""


def _ahead(items: Generator[Item]) -> Generator[Item]:
    """The items, each made by a thread while the one before is used: h5py lets the interpreter go while it reads."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item  # type: ignore[misc]


class FolderFilms:
    """Image files in a folder; `names` are those of the rows from `first` on."""

    def __init__(self, config: SourceConfig, names: Sequence[str], first: int) -> None:
        assert config.images is not None
        self._folder, self._size, self._range = config.images.resolve(), config.image_size, config.value_range
        self._names, self._first = names, first

    def read(self, first: int, end: int) -> Iterator[Film]:
        """Films first..end. InputError, naming the row, where the storage fails and not the film."""
        for row in range(first, end):
            try:
                yield self._read(self._names[row - self._first])
            except OSError as error:
                raise InputError(
                    f"the image file of row {row} cannot be read ({error.strerror}); run the command again to go on"
                ) from None

    def stored(self, first: int, end: int) -> NDArray[np.int64]:
        """(end - first,) bytes of the image files, 0 for missing ones."""
        stamps = (_stamp(self._path(self._names[row - self._first])) for row in range(first, end))
        return np.array([int(stamp.split()[0]) if stamp else 0 for stamp in stamps], dtype=np.int64)

    def stamp(self) -> str:
        """Digest of the files' sizes and times of change: another one means other films. Nothing is opened."""
        stamps = [_stamp(self._path(name)) for name in self._names]
        return xxh3_128_hexdigest("\n".join(stamps).encode())

    def _read(self, name: str) -> Film:
        path = self._path(name)
        return Fault.MISSING if path is None else read_film(path, self._size, self._range)

    def _path(self, name: str) -> Path | None:
        # A name from a CSV may say anything; it may not lead out of the folder, by `..` or by a link.
        if not name.strip() or "\0" in name:
            return None
        try:
            path = (self._folder / name).resolve()
        except (OSError, RuntimeError):  # links in a circle
            return None
        return path if path.is_relative_to(self._folder) else None


Films = H5Films | FolderFilms


@contextmanager
def open_films(config: SourceConfig, files: Sequence[H5File], names: Sequence[str], first: int = 0) -> Iterator[Films]:
    """The films of a source, of which a look told `files`; `names` are the image files of the rows from `first` on."""
    if config.images is not None:
        yield FolderFilms(config, names, first)
        return
    with H5Films(config, files) as films:
        yield films


def _stamp(path: Path | None) -> str:
    try:
        stat = path.stat() if path else None
    except OSError:  # missing, or a name that no file can have
        stat = None
    return f"{stat.st_size} {stat.st_mtime_ns}" if stat else ""
