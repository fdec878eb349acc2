"""Phase one: the source once, in its own order. A range of rows becomes a spill: JPEGs end to end, and a record a row.

Runs in worker processes; imports neither torch nor open_clip.
"""

import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from xxhash import xxh3_64_intdigest

from ingest.source import H5Source
from shards.atomic import atomic_file

RANGE_ROWS = 256
"""Rows of a spill, whatever the worker count: an interrupted ingest may go on with another."""
_CHUNK_ROWS = 32
"""Rows read at once: 13 MB of 320 x 320 float32."""
_MEASURE_EVERY = 16
"""Every so many rows the JPEG is decoded again to measure what it lost."""
_MODEL_SIZE = 224

FILM_REASONS = {0: "", 1: "film is all zero", 2: "film is constant"}
"""Code in the spill -> why the film disqualifies its row."""

RECORD = np.dtype(
    [
        ("offset", "<i8"),  # in the spill
        ("size", "<i4"),  # 0 where the row was not encoded
        ("reason", "u1"),  # key of FILM_REASONS
        ("pixels", "<u8"),  # xxh3-64 of the row as uint8
        ("error", "<f4"),  # mean squared error of the JPEG in grey levels^2, NaN where not measured
        ("resized_error", "<f4"),  # the same after the bicubic resize to 224
        ("resized_difference", "<f4"),  # mean absolute difference after the resize, in grey levels
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeTask:
    """One range of source rows to encode."""

    h5: Path
    dataset: str
    first: int
    end: int
    wanted: NDArray[np.bool_]
    """(end - first,) rows to encode; the others are only looked at."""
    quality: int
    spill: Path
    """Path of the spill without its suffix; `.bin` and `.npy` are written, the latter last."""


def encode_range(task: EncodeTask) -> int:
    """Write one spill; returns the number of rows done. A spill that is there already is kept."""
    if not task.spill.with_suffix(".npy").exists():
        records = np.zeros(task.end - task.first, dtype=RECORD)
        with H5Source(task.h5, task.dataset) as source, atomic_file(task.spill.with_suffix(".bin")) as file:
            for start in range(task.first, task.end, _CHUNK_ROWS):
                images = source.read_uint8(start, min(start + _CHUNK_ROWS, task.end))
                for row, image in enumerate(images, start):
                    _encode_row(row, image, task, records[row - task.first], file)
        with atomic_file(task.spill.with_suffix(".npy")) as file:
            np.save(file, records, allow_pickle=False)
    return task.end - task.first


def _encode_row(row: int, image: NDArray[np.uint8], task: EncodeTask, record: np.void, file) -> None:
    record["pixels"] = xxh3_64_intdigest(image.data)
    low, high = image.min(), image.max()
    record["reason"] = (1 if high == 0 else 2) if low == high else 0
    record["error"] = record["resized_error"] = record["resized_difference"] = np.nan
    if record["reason"] or not task.wanted[row - task.first]:
        return
    encoded = encode_jpeg(image, task.quality)
    record["offset"], record["size"] = file.tell(), len(encoded)
    file.write(encoded)
    if row % _MEASURE_EVERY == 0:
        _measure(image, encoded, record)


def encode_jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    """(H, W) grey levels to a grey baseline JPEG, by libjpeg-turbo with its accurate integer DCT."""
    pixels = np.ascontiguousarray(image)[..., None]
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="GRAY", colorsubsampling="Gray", fastdct=False)


def _measure(image: NDArray[np.uint8], encoded: bytes, record: np.void) -> None:
    before, after = Image.fromarray(image), Image.open(BytesIO(encoded))
    record["error"] = _difference(before, after).var_about_zero
    resized = _difference(*(x.resize((_MODEL_SIZE, _MODEL_SIZE), Image.Resampling.BICUBIC) for x in (before, after)))
    record["resized_error"], record["resized_difference"] = resized.var_about_zero, resized.mean_absolute


@dataclass(frozen=True, slots=True)
class _Difference:
    var_about_zero: float
    mean_absolute: float


def _difference(before: Image.Image, after: Image.Image) -> _Difference:
    delta = np.asarray(before, dtype=np.float32) - np.asarray(after, dtype=np.float32)
    return _Difference(float((delta**2).mean()), float(np.abs(delta).mean()))


class Spills:
    """All records of phase one, and the JPEGs by row. 41 bytes a source row in memory, file handles bounded."""

    _MAX_OPEN = 128

    def __init__(self, folder: Path, rows: int) -> None:
        self._folder = folder
        self._open: dict[int, int] = {}
        parts = [np.load(spill_path(folder, first).with_suffix(".npy")) for first in range(0, rows, RANGE_ROWS)]
        self.records = np.concatenate(parts)

    def image(self, row: int) -> bytes:
        """The encoded image of a source row that was encoded."""
        record = self.records[row]
        return os.pread(self._handle(row - row % RANGE_ROWS), int(record["size"]), int(record["offset"]))

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
    """Where the spill of the range that starts at row `first` lies, without its suffix."""
    return folder / f"spill-{first:010d}"
