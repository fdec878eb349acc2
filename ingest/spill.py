"""What phase one leaves to phase two: encoded images end to end, and a record a row.

Within runs of 32 MiB the images lie in the order in which the shards will have them, so that what a shard needs of a
run is one piece: a shard is read in few large extents, not film by film at random.
"""

import contextlib
import itertools
import mmap
import os
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from shards.digest import DIGEST_SIZE, HashingFile, stream_digest
from shards.errors import InputError
from shards.stream import ALIGNMENT, StreamWriter, atomic_stream, new_buffer, read_extents

RECORD = np.dtype(
    [
        ("offset", "<i8"),  # in the spill
        ("size", "<i4"),  # 0 where the row was not encoded
        ("fault", "u1"),  # a Fault: why the row cannot become a sample
        ("blank", "u1"),  # a Fault: whether the film shows nothing
        ("stored", "<i8"),  # bytes that the film takes in its source
        ("xxh3", "<u8"),  # xxh3-64 of the encoded image
        ("pixels", "<u8"),  # xxh3-64 of the row as uint8, 0 where there are none
        ("error", "<f4"),  # mean squared error of the encoding in grey levels^2, NaN where not measured
        ("resized_error", "<f4"),  # the same after the bicubic resize to 224
        ("resized_difference", "<f4"),  # mean absolute difference after the resize, in grey levels
    ]
)

_TRAILER = struct.Struct("<q16s")
"""Rows, and the stamp of the image files; the digest of everything before follows."""
_RUN_BYTES = _PART_BYTES = 32 << 20
"""Images that a worker holds twice: while it encodes, and while it makes a shard."""
_GAP = 16 << 10
"""Bytes between two images that are rather read than skipped."""
_READERS = 16
"""Threads that read extents: a parallel file system answers each after milliseconds."""

_spare: list[mmap.mmap] = []
"""Buffers of readers that are done, for the next."""


class SpillWriter:
    """Takes the images of one spill, in the order of its rows. A thread sorts and writes a run while the next grows."""

    def __init__(self, stream: StreamWriter, rows: int, thread: ThreadPoolExecutor) -> None:
        self.records = np.zeros(rows, dtype=RECORD)
        """(rows,), for the caller to fill in, but for offset, size and xxh3 of images."""
        self._stream, self._sink = stream, HashingFile(stream)
        self._run: list[tuple[int, int, bytes]] = []
        self._run_bytes = 0
        self._thread = thread
        self._writing: Future[None] | None = None

    def add(self, number: int, place: int, image: bytes) -> None:
        """The encoded image of row `number` of the spill; `place`: where the shards have it, all counted through."""
        self._run.append((place, number, image))
        self._run_bytes += len(image)
        if self._run_bytes >= _RUN_BYTES:
            self._end_run()

    def finish(self, stamp: str) -> None:
        """Write what is left, records and trailer."""
        self._end_run()
        self._wait()
        self._sink.write(self.records.tobytes() + _TRAILER.pack(len(self.records), bytes.fromhex(stamp)))
        self._stream.write(self._sink.digest)

    def _end_run(self) -> None:
        self._wait()  # two runs are all that memory holds
        if self._run:
            self._writing = self._thread.submit(self._write_run, self._run)
            self._run, self._run_bytes = [], 0

    def _wait(self) -> None:
        """For the run that is being written. Raises what the disk says."""
        if self._writing:
            self._writing.result()
            self._writing = None

    def _write_run(self, run: list[tuple[int, int, bytes]]) -> None:
        run.sort()
        numbers = [number for _, number, _ in run]
        sizes = np.array([len(image) for _, _, image in run])
        self.records["offset"][numbers] = self._sink.written + np.cumsum(sizes) - sizes
        self.records["size"][numbers] = sizes
        self.records["xxh3"][numbers] = [xxh3_64_intdigest(image) for _, _, image in run]
        for _, _, image in run:
            self._sink.write(image)


@contextlib.contextmanager
def open_spill(path: Path, rows: int, stamp: str) -> Iterator[SpillWriter]:
    """Write a spill; it has its name once it is whole. `stamp`: 32 hex digits, of the image files it comes from."""
    with atomic_stream(path, durable=False) as stream, ThreadPoolExecutor(1) as thread:
        writer = SpillWriter(stream, rows, thread)
        yield writer
        writer.finish(stamp)


def spill_path(folder: Path, first: int) -> Path:
    """Where the spill that starts at row `first`, all sources counted through, lies."""
    return folder / f"{first:010d}.spill"


def whole_spill(path: Path) -> tuple[int, str] | None:
    """Rows and stamp of a spill that is what was written, to the last byte; None where it is not, or not there."""
    try:
        with open(path, "rb") as file:
            found = stream_digest(file, os.fstat(file.fileno()).st_size - DIGEST_SIZE)
            if found != file.read():
                return None
            rows, stamp = _read_trailer(file)
            return rows, stamp.hex()
    except (OSError, ValueError, struct.error):
        return None


def _read_trailer(file: BinaryIO) -> tuple[int, bytes]:
    """Rows and stamp, from near the end of a spill; the records end where they begin."""
    file.seek(-_TRAILER.size - DIGEST_SIZE, os.SEEK_END)
    return _TRAILER.unpack(file.read(_TRAILER.size))


def read_records(folder: Path, starts: NDArray[np.int64]) -> NDArray[np.void]:
    """(rows,) RECORDs of all spills; `starts` are the numbers of their first rows, all sources counted through."""
    return np.concatenate([_read_records(spill_path(folder, int(row))) for row in starts])


def _read_records(spill: Path) -> NDArray[np.void]:
    with open(spill, "rb") as file:
        size = _read_trailer(file)[0] * RECORD.itemsize
        file.seek(-_TRAILER.size - DIGEST_SIZE - size, os.SEEK_END)
        return np.frombuffer(file.read(size), dtype=RECORD)


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """Where n encoded images lie, in the order in which they are wanted."""

    rows: NDArray[np.int64]
    """(n,) all sources counted through."""
    offsets: NDArray[np.int64]
    """(n,) in the row's spill."""
    sizes: NDArray[np.int32]
    """(n,) bytes."""
    hashes: NDArray[np.uint64]
    """(n,) xxh3-64."""


class SpillReader:
    """Encoded images out of the spills of a work folder."""

    def __init__(self, folder: Path, starts: NDArray[np.int64]) -> None:
        """`starts`: (spills,) the number of each spill's first row, all sources counted through."""
        self._folder, self._starts = folder, starts
        self._threads = ThreadPoolExecutor(_READERS)
        self._buffers = [_spare.pop() if _spare else new_buffer(ALIGNMENT) for _ in range(2)]

    def read(self, images: Images) -> Iterator[memoryview]:
        """Each image in turn, good until the next is asked for; 32 MiB are read while the 32 MiB before are used.

        InputError where the disk gives back another one.
        """
        spills = np.searchsorted(self._starts, images.rows, side="right") - 1
        parts = [slice(*cut) for cut in _cuts(images.sizes)]
        ahead = self._begin(images, spills, parts[0])
        for number, part in enumerate(parts):
            pending, places = ahead
            for each in pending:
                each.result()
            buffer = memoryview(self._buffers[0])
            self._buffers.reverse()
            if number + 1 < len(parts):
                ahead = self._begin(images, spills, parts[number + 1])
            ends = places + images.sizes[part]
            expected = zip(images.hashes[part].tolist(), spills[part].tolist(), strict=True)
            for start, end, (xxh3, spill) in zip(places.tolist(), ends.tolist(), expected, strict=True):
                image = buffer[start:end]
                self._check(image, xxh3, spill)
                yield image

    def _begin(
        self, images: Images, spills: NDArray[np.int64], part: slice
    ) -> tuple[list[Future[None]], NDArray[np.int64]]:
        """Begin to read a part into the first buffer: what to wait for, and (n,) where its images will lie."""
        extents, places = _extents(spills[part], images.offsets[part], images.sizes[part])
        total = int(extents["size"].sum())
        if len(self._buffers[0]) < total:
            self._buffers[0] = new_buffer(total)
        pending, at = [], 0
        for spill in np.unique(extents["spill"]).tolist():
            wanted = extents[extents["spill"] == spill]
            size = int(wanted["size"].sum())
            path = spill_path(self._folder, int(self._starts[spill]))
            target = memoryview(self._buffers[0])[at : at + size]
            places_in_file = list(zip(wanted["offset"].tolist(), wanted["size"].tolist(), strict=True))
            pending.append(self._threads.submit(read_extents, path, places_in_file, target))
            at += size
        return pending, places

    def _check(self, image: memoryview, xxh3: int, spill: int) -> None:
        if xxh3_64_intdigest(image) != xxh3:
            raise InputError(
                f"{spill_path(self._folder, int(self._starts[spill])).name} in {self._folder} is not what was written "
                "there; look after the disk, then run the same command again: it makes the file anew"
            )

    def close(self) -> None:
        """End the threads. What was read last is good no more."""
        self._threads.shutdown(cancel_futures=True)
        _spare.extend(self._buffers)


def _cuts(sizes: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """First and end of each part of about _PART_BYTES."""
    part_of = np.cumsum(sizes, dtype=np.int64) // _PART_BYTES
    first = [0, *(np.flatnonzero(np.diff(part_of)) + 1).tolist(), len(sizes)]
    return itertools.pairwise(first)


def _extents(
    spills: NDArray[np.int64], offsets: NDArray[np.int64], sizes: NDArray[np.int32]
) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """What to read for n images, aligned, spill after spill; and (n,) where each then lies in the whole of it."""
    order = np.lexsort((offsets, spills))
    spill, begin = spills[order], offsets[order]
    end = begin + sizes[order]
    apart = (np.diff(spill) != 0) | (begin[1:] - end[:-1] > _GAP)
    first = np.concatenate([[0], np.flatnonzero(apart) + 1])
    last = np.concatenate([first[1:] - 1, [len(order) - 1]])
    extents = np.empty(len(first), dtype=[("spill", "<i8"), ("offset", "<i8"), ("size", "<i8")])
    extents["spill"], extents["offset"] = spill[first], begin[first] // ALIGNMENT * ALIGNMENT
    extents["size"] = -(-end[last] // ALIGNMENT) * ALIGNMENT - extents["offset"]
    moved = np.concatenate([[0], np.cumsum(extents["size"])[:-1]]) - extents["offset"]
    places = np.empty(len(order), dtype=np.int64)
    places[order] = begin + np.repeat(moved, last - first + 1)
    return extents, places
