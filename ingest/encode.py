"""Phase one: each source once, in its order. A range of rows becomes a spill: images end to end, and a record a row.

Runs in worker processes; imports neither torch nor open_clip.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from xxhash import xxh3_64_intdigest

from ingest.config import SourceConfig
from ingest.films import Film, FolderFilms, H5Films
from ingest.images import Fault
from shards.atomic import atomic_file
from shards.encodings import decode, encode
from shards.schema import ImageSpec

RANGE_ROWS = 256
"""About as many rows make a spill, whatever the worker count: an interrupted ingest may go on with another."""
_MEASURE_EVERY = 16
"""Every so many rows the image is decoded again to measure what it lost."""
_MODEL_SIZE = 224

RECORD = np.dtype(
    [
        ("offset", "<i8"),  # in the spill
        ("size", "<i4"),  # 0 where the row was not encoded
        ("fault", "u1"),  # a Fault
        ("pixels", "<u8"),  # xxh3-64 of the row as uint8, 0 where there are none
        ("error", "<f4"),  # mean squared error of the encoding in grey levels^2, NaN where not measured
        ("resized_error", "<f4"),  # the same after the bicubic resize to 224
        ("resized_difference", "<f4"),  # mean absolute difference after the resize, in grey levels
    ]
)


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
    spill: Path
    """Path of the spill without its suffix; `.bin` and `.npy` are written, the latter last."""


def encode_range(task: EncodeTask) -> int:
    """Write one spill; returns the number of rows done. A spill that is there already is kept."""
    if not task.spill.with_suffix(".npy").exists():
        records = np.zeros(task.end - task.first, dtype=RECORD)
        with atomic_file(task.spill.with_suffix(".bin")) as file:
            if task.source.images is None:
                with H5Films(task.source) as films:
                    _encode_films(films.read(task.first, task.end), task, records, file)
            else:
                folder = FolderFilms(task.source.images, task.source.image_size, task.names, task.first)
                _encode_films(folder.read(task.first, task.end), task, records, file)
        with atomic_file(task.spill.with_suffix(".npy")) as file:
            np.save(file, records, allow_pickle=False)
    return task.end - task.first


def _encode_films(films, task: EncodeTask, records: NDArray[np.void], file: BinaryIO) -> None:
    for number, film in enumerate(films):
        _encode_row(number, film, task, records[number], file)


def _encode_row(number: int, film: Film, task: EncodeTask, record: np.void, file: BinaryIO) -> None:
    record["error"] = record["resized_error"] = record["resized_difference"] = np.nan
    record["fault"] = film if isinstance(film, Fault) else blank(film)
    if isinstance(film, Fault):
        return
    record["pixels"] = xxh3_64_intdigest(np.ascontiguousarray(film).data)
    if record["fault"] or not task.wanted[number]:
        return
    encoded = encode(film, task.image)
    record["offset"], record["size"] = file.tell(), len(encoded)
    file.write(encoded)
    if (task.first + number) % _MEASURE_EVERY == 0:
        _measure(film, decode(encoded, task.image), record)


def blank(film: NDArray[np.uint8]) -> Fault:
    """Whether a film shows nothing at all."""
    low, high = film.min(), film.max()
    return Fault.NONE if low != high else Fault.CONSTANT if high else Fault.ALL_ZERO


def _measure(before: NDArray[np.uint8], after: NDArray[np.uint8], record: np.void) -> None:
    record["error"] = (_difference(before, after) ** 2).mean()
    resized = [
        np.asarray(Image.fromarray(pixels).resize((_MODEL_SIZE, _MODEL_SIZE), Image.Resampling.BICUBIC))
        for pixels in (before, after)
    ]
    difference = _difference(*resized)
    record["resized_error"], record["resized_difference"] = (difference**2).mean(), np.abs(difference).mean()


def _difference(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.float32]:
    return before.astype(np.float32) - after


class Spills:
    """All records of phase one, and the images by row. 37 bytes a row in memory, file handles bounded."""

    _MAX_OPEN = 128

    def __init__(self, folder: Path, starts: NDArray[np.int64]) -> None:
        """`starts`: (spills,) the number of each spill's first row, all sources counted through."""
        self._folder, self._starts = folder, starts
        self._open: dict[int, int] = {}
        self.records = np.concatenate([np.load(spill_path(folder, int(row)).with_suffix(".npy")) for row in starts])

    def image(self, row: int) -> bytes:
        """The encoded image of a row that was encoded."""
        record = self.records[row]
        start = int(self._starts[np.searchsorted(self._starts, row, side="right") - 1])
        return os.pread(self._handle(start), int(record["size"]), int(record["offset"]))

    def close(self) -> None:
        """Close the file handles."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _handle(self, first: int) -> int:
        if first not in self._open:
            if len(self._open) >= self._MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[first] = os.open(spill_path(self._folder, first).with_suffix(".bin"), os.O_RDONLY | os.O_CLOEXEC)
        return self._open[first]


def spill_path(folder: Path, first: int) -> Path:
    """Where the spill that starts at row `first`, all sources counted through, lies; without its suffix."""
    return folder / f"spill-{first:010d}"
