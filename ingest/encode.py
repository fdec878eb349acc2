"""Phase one: each source once, in its order. A range of rows becomes a spill: images end to end, and a record a row.

Runs in worker processes; imports neither torch nor open_clip.
"""

import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from ingest.config import SourceConfig
from ingest.films import Film, Films, FolderFilms, H5Films
from ingest.images import Fault
from ingest.loss import loss
from shards.atomic import atomic_file
from shards.digest import DIGEST_SIZE, HashingFile, stream_digest
from shards.encodings import decode, encode
from shards.errors import InputError
from shards.schema import ImageSpec

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
_NO_STAMP = "00" * 16


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeTask:
    """One range of a source's rows to encode."""

    source: SourceConfig
    first: int
    end: int
    """Rows of the source."""
    names: tuple[str, ...]
    """Image files of these rows; empty for HDF5."""
    wanted: NDArray[np.bool_]
    """(end - first,) rows to encode; the others are only looked at."""
    image: ImageSpec
    measure_every: int
    """Every so many rows the image is decoded again to measure what it lost: 3 ms."""
    spill: Path


def encode_range(task: EncodeTask) -> int:
    """Write one spill; returns the number of rows done. A spill that is there already, and whole, is kept.

    InputError where image files changed since it was made.
    """
    source = task.source
    if source.images is None:
        if not _is_whole(task, _NO_STAMP):
            with H5Films(source) as films:
                _write_spill(films, task, _NO_STAMP)
        return task.end - task.first
    folder = FolderFilms(source.images, source.image_size, task.names, task.first)
    stamp = folder.stamp()
    if not _is_whole(task, stamp):
        _write_spill(folder, task, stamp)
    return task.end - task.first


def _write_spill(films: Films, task: EncodeTask, stamp: str) -> None:
    """Images end to end, a record a row, a trailer with the digest of all of it: for a disk that lost power."""
    records = np.zeros(task.end - task.first, dtype=RECORD)
    records["stored"] = films.stored(task.first, task.end)
    with atomic_file(task.spill, durable=False) as file:
        sink = HashingFile(file)
        for number, film in enumerate(films.read(task.first, task.end)):
            _encode_row(number, film, task, records[number], sink)
        sink.write(records.tobytes() + _TRAILER.pack(len(records), bytes.fromhex(stamp)))
        file.write(sink.digest)


def _is_whole(task: EncodeTask, stamp: str) -> bool:
    """Whether an earlier run finished this spill and it still is what it was. InputError where it had other films."""
    try:
        with open(task.spill, "rb") as file:
            found = stream_digest(file, os.fstat(file.fileno()).st_size - DIGEST_SIZE)
            sound = found == file.read()
            rows, before = _read_trailer(file)
    except (OSError, ValueError, struct.error):
        return False
    if sound and before != bytes.fromhex(stamp):
        raise InputError(
            f"image files of rows {task.first:,} to {task.end - 1:,} changed since this ingest was begun; "
            "restore them, or empty the output folder to begin anew"
        )
    return sound and rows == task.end - task.first


def _read_trailer(file: BinaryIO) -> tuple[int, bytes]:
    """Rows and stamp, from near the end of a spill; the records end where they begin."""
    file.seek(-_TRAILER.size - DIGEST_SIZE, os.SEEK_END)
    return _TRAILER.unpack(file.read(_TRAILER.size))


def _encode_row(number: int, film: Film, task: EncodeTask, record: np.void, sink: HashingFile) -> None:
    record["error"] = record["resized_error"] = record["resized_difference"] = np.nan
    if isinstance(film, Fault):
        record["fault"] = film
        return
    record["blank"] = blank(film)
    record["fault"] = Fault.NONE if task.source.allow_blank else record["blank"]
    record["pixels"] = xxh3_64_intdigest(np.ascontiguousarray(film).data)
    if record["fault"] or not task.wanted[number]:
        return
    encoded = encode(film, task.image)
    record["offset"], record["size"] = sink.written, sink.write(encoded)
    record["xxh3"] = xxh3_64_intdigest(encoded)
    if (task.first + number) % task.measure_every == 0:
        for name, value in asdict(loss(film, decode(encoded, task.image))).items():
            record[name] = value


def blank(film: NDArray[np.uint8]) -> Fault:
    """Whether a film shows nothing at all."""
    low, high = film.min(), film.max()
    return Fault.NONE if low != high else Fault.CONSTANT if high else Fault.ALL_ZERO


def read_records(folder: Path, starts: NDArray[np.int64]) -> NDArray[np.void]:
    """(rows,) RECORDs of all spills; `starts` are the numbers of their first rows, all sources counted through."""
    return np.concatenate([_read_records(spill_path(folder, int(row))) for row in starts])


def _read_records(spill: Path) -> NDArray[np.void]:
    with open(spill, "rb") as file:
        size = _read_trailer(file)[0] * RECORD.itemsize
        file.seek(-_TRAILER.size - DIGEST_SIZE - size, os.SEEK_END)
        return np.frombuffer(file.read(size), dtype=RECORD)


class SpillReader:
    """Encoded images by row, out of a bounded number of open files."""

    _MAX_OPEN = 256

    def __init__(self, folder: Path, starts: NDArray[np.int64]) -> None:
        """`starts`: (spills,) the number of each spill's first row, all sources counted through."""
        self._folder, self._starts = folder, starts
        self._open: dict[int, int] = {}

    def image(self, row: int, offset: int, size: int, xxh3: int) -> bytes:
        """The encoded image of a row, as its record describes it. InputError where the disk gives back another one."""
        start = int(self._starts[np.searchsorted(self._starts, row, side="right") - 1])
        content = os.pread(self._handle(start), size, offset)
        if xxh3_64_intdigest(content) != xxh3:
            raise InputError(
                f"{spill_path(self._folder, start).name} in {self._folder} is not what was written there; look after "
                "the disk, then run the same command again: it makes the file anew"
            )
        return content

    def close(self) -> None:
        """Close the file handles."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _handle(self, first: int) -> int:
        if first not in self._open:
            if len(self._open) >= self._MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[first] = os.open(spill_path(self._folder, first), os.O_RDONLY | os.O_CLOEXEC)
        return self._open[first]


def spill_path(folder: Path, first: int) -> Path:
    """Where the spill that starts at row `first`, all sources counted through, lies."""
    return folder / f"{first:010d}.spill"
