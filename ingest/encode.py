"""Phase one: each source once, in its order. A range of rows becomes a spill.

Runs in worker processes; imports neither torch nor open_clip.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from ingest.config import SourceConfig
from ingest.films import Film, Films, H5File, open_films
from ingest.images import Fault
from ingest.spill import SpillWriter, open_spill, whole_spill
from shards.encodings import decode, encode, loss
from shards.errors import InputError
from shards.schema import ImageSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeTask:
    """One range of a source's rows to encode."""

    source: SourceConfig
    first: int
    end: int
    """Rows of the source."""
    files: tuple[H5File, ...]
    """The HDF5 files of the source."""
    names: tuple[str, ...]
    """Image files of these rows; empty for HDF5."""
    places: NDArray[np.int64]
    """(end - first,) where the shards have each row, all of them counted through; -1: it is only looked at."""
    image: ImageSpec
    measure_every: int
    """Every so many rows the image is decoded again to measure what it lost: 3 ms."""
    spill: Path


def encode_range(task: EncodeTask) -> int:
    """Write one spill; returns the number of rows done. A spill that is there already, and whole, is kept.

    InputError where image files changed since it was made.
    """
    with open_films(task.source, task.files, task.names, task.first) as films:
        stamp = films.stamp()
        if not _is_whole(task, stamp):
            _write_spill(films, task, stamp)
    return task.end - task.first


def _is_whole(task: EncodeTask, stamp: str) -> bool:
    """Whether an earlier run finished this spill and it still is what it was. InputError where it had other films."""
    found = whole_spill(task.spill)
    if found and found[1] != stamp:
        raise InputError(
            f"image files of rows {task.first:,} to {task.end - 1:,} changed since this ingest was begun; "
            "restore them, or empty the output folder to begin anew"
        )
    return found == (task.end - task.first, stamp)


def _write_spill(films: Films, task: EncodeTask, stamp: str) -> None:
    with open_spill(task.spill, task.end - task.first, stamp) as spill:
        spill.records["stored"] = films.stored(task.first, task.end)
        for name in ("error", "resized_error", "resized_difference"):
            spill.records[name] = np.nan
        for number, film in enumerate(films.read(task.first, task.end)):
            _encode_row(number, film, task, spill)


def _encode_row(number: int, film: Film, task: EncodeTask, spill: SpillWriter) -> None:
    records = spill.records
    if isinstance(film, Fault):
        records["fault"][number] = film
        return
    records["pixels"][number] = xxh3_64_intdigest(np.ascontiguousarray(film).data)
    shows = blank(film)
    if shows:
        records["blank"][number] = shows
    if shows and not task.source.allow_blank:
        records["fault"][number] = shows
    elif task.places[number] >= 0:
        encoded = encode(film, task.image)
        spill.add(number, int(task.places[number]), encoded)
        if (task.first + number) % task.measure_every == 0:
            for name, value in asdict(loss(film, decode(encoded, task.image))).items():
                records[name][number] = value


def blank(film: NDArray[np.uint8]) -> Fault:
    """Whether an (H, W) film shows nothing at all: one grey level, be it with the black that makes it square."""
    row, column = film.shape[0] // 2, film.shape[1] // 2
    middle = film[row, column]
    # Nearly always, and much the cheapest: its middle is another grey than the ends of both lines through it.
    if (film[row, 0] != middle or film[row, -1] != middle) and (
        film[0, column] != middle or film[-1, column] != middle
    ):
        return Fault.NONE
    rows, columns = film.any(axis=1), film.any(axis=0)
    if not rows.any():
        return Fault.ALL_ZERO
    shown = film[rows][:, columns]
    as_padded = rows.all() or columns.all()  # at two sides at most; a few bright pixels are no film of one grey level
    return Fault.CONSTANT if as_padded and shown.min() == shown.max() else Fault.NONE
