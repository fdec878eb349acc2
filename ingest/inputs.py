"""Everything that is read before the first film: tables of all sources, what their films look like, the plan."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ingest.config import IngestConfig, SourceConfig
from ingest.films import Film, H5File, H5Films, open_films
from ingest.images import Fault
from ingest.plan import Plan, make_plan
from ingest.table import SourceTable, read_table
from shards.errors import InputError
from shards.schema import MAX_IMAGE_PIXELS, MAX_IMAGE_SIDE, MAX_LABELS

_MOST_NAMED = 4
"""Files that a message names."""
_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Rows of one source that become one spill."""

    source: int
    first: int
    end: int
    """Rows of the source."""
    start: int
    """Number of the first row, all sources counted through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What was read."""

    sources: tuple[SourceConfig, ...]
    tables: tuple[SourceTable, ...]
    height: int
    width: int
    ranges: tuple[Range, ...]
    files: tuple[tuple[H5File, ...], ...]
    """The HDF5 files of each source; none for image files."""
    texts: pa.ChunkedArray
    """(rows,) of all sources."""
    label_names: tuple[str, ...]
    """Of all sources, in order of first appearance."""
    labels: NDArray[np.float32]
    """(rows, labels), NaN where unknown or where the source has no such label."""
    plan: Plan
    notes: tuple[str, ...]
    """Lines that whoever started this should read before it goes on."""

    @property
    def rows(self) -> int:
        """Rows of all sources."""
        return len(self.texts)

    @property
    def starts(self) -> NDArray[np.int64]:
        """(sources + 1,) number of each source's first row, and the number of rows."""
        return np.concatenate([[0], np.cumsum([table.rows for table in self.tables])])

    @property
    def source_of(self) -> NDArray[np.int64]:
        """(rows,) the source of each row."""
        return np.repeat(np.arange(len(self.tables)), np.diff(self.starts))

    @property
    def spill_starts(self) -> NDArray[np.int64]:
        """(ranges,) number of each range's first row, all sources counted through."""
        return np.array([each.start for each in self.ranges])


def read_inputs(config: IngestConfig) -> Inputs:
    """Read the CSV files, look at the films, refuse what does not fit, and plan."""
    sources = config.source_list()
    tables = tuple(read_table(source) for source in sources)
    sizes, ranges, files = [], [], []
    notes = list(order_lines(sources))
    for number, (source, table) in enumerate(zip(sources, tables, strict=True)):
        size, spans, found = _look(source, table, range_rows(table.rows))
        sizes.append(size)
        files.append(found)
        of_source = f" of source {number}" if len(sources) > 1 else ""
        notes += _range_lines(source, found, table, of_source)
        start = sum(each.rows for each in tables[:number])
        ranges += [Range(source=number, first=first, end=end, start=start + first) for first, end in spans]
    height, width = sizes[0]
    for number, (high, wide) in enumerate(sizes):
        if (high, wide) != sizes[0]:
            raise InputError(
                f"films of source {number} have {high} x {wide} pixels, those of source 0 {height} x {width}; a set "
                "needs one size (image_size says which one image files get)"
            )
    if height * width > MAX_IMAGE_PIXELS:
        raise InputError(f"films of {height} x {width}; {MAX_IMAGE_PIXELS:,} pixels are the most a shard takes")
    if max(height, width) > MAX_IMAGE_SIDE:
        raise InputError(f"films of {height} x {width}; {MAX_IMAGE_SIDE:,} pixels are the longest side a shard takes")
    pa.default_memory_pool().release_unused()  # what reading left, half as much again as the reports themselves
    label_names = tuple(dict.fromkeys(name for table in tables for name in table.labels))
    if len(label_names) > MAX_LABELS:
        raise InputError(f"{len(label_names):,} labels; {MAX_LABELS:,} are the most a shard takes")
    return Inputs(
        sources=sources,
        tables=tables,
        height=height,
        width=width,
        ranges=tuple(ranges),
        files=tuple(files),
        texts=pa.chunked_array([chunk for table in tables for chunk in table.texts.chunks], pa.large_string()),
        label_names=label_names,
        labels=_stack_labels(tables, label_names),
        plan=make_plan(config, tables),
        notes=tuple(notes),
    )


def range_rows(rows: int) -> int:
    """About as many rows make a spill: 64 spills a source, each of 64 to 4,096 rows, whatever the worker count.

    An interrupted ingest may go on with other workers; few spills can all be open while shards are made from them.
    """
    return min(max(rows // 64, 64), 4096)


def _look(
    source: SourceConfig, table: SourceTable, step: int
) -> tuple[tuple[int, int], list[tuple[int, int]], tuple[H5File, ...]]:
    """Height and width of a source's films, its rows in ranges, and its HDF5 files.

    InputError where films and rows do not match.
    """
    if source.images is not None:
        if not source.images.is_dir():
            raise InputError(f"no folder of images at {source.images}")
        if not os.access(source.images, os.R_OK | os.X_OK):
            raise InputError(f"the folder of images {source.images} may not be read; change its permissions")
        _check_names(source.images, table.names)
        spans = [(first, min(first + step, table.rows)) for first in range(0, table.rows, step)]
        return (source.image_size,) * 2, spans, ()
    with H5Films(source) as films:
        if films.rows != table.rows:
            raise InputError(
                f"{_files(source.h5)}: {films.rows:,} films but the CSV has {table.rows:,} rows; "
                "row i must describe film i"
            )
        next(films.read(0, 1))  # values that need --value-range are known before there is anything to go on with
        return (films.height, films.width), list(films.ranges(step)), films.files


def order_lines(sources: Sequence[SourceConfig]) -> Iterator[str]:
    """Where a shell put `films-10.h5` before `films-2.h5`: with a CSV in the order of the numbers, every later film
    would get another one's report.
    """
    for source in sources:
        counted = sorted(source.h5, key=_by_number)
        numbered = len({_NUMBER.sub("", str(path)) for path in source.h5}) == 1
        found = [(path, other) for path, other in zip(source.h5, counted, strict=True) if path != other]
        if numbered and found:
            before, after = (path.name for path in found[0])
            if before == after:  # they lie in folders with numbers
                before, after = map(str, found[0])
            yield f"HDF5 files are read as given, {before} before {after}: see that the CSV's rows are in that order"


def _by_number(path: Path) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in _NUMBER.split(str(path))]


def _files(paths: Sequence[Path]) -> str:
    """Files for a message; of many the first and the last tell whether the shell took more or fewer than was meant."""
    if len(paths) <= _MOST_NAMED:
        return ", ".join(map(str, paths))
    return f"{len(paths):,} files from {paths[0]} to {paths[-1]}"


def _check_names(folder: Path, names: list[str]) -> None:
    """InputError where no row names an image file, by 64 rows of all: before minutes go into rejecting every one."""
    tried = names[:: -(-len(names) // 64) or 1]
    if tried and not any(os.path.isfile(folder / name) for name in tried):  # Path's raises for a name too long
        raise InputError(
            f"none of {len(tried):,} rows looked at names an image file in {folder}; "
            "is it the folder that the paths in --path-column are relative to, and the right column?"
        )


def _range_lines(source: SourceConfig, files: tuple[H5File, ...], table: SourceTable, whose: str) -> Iterator[str]:
    """What --value-range, given or not, does not do to 8 films, spread evenly: what a user has to hear at once.

    InputError where they all need one: later it would be another ingest's setting.
    """
    rows = range(0, table.rows, -(-table.rows // 8) or 1)
    if source.value_range is not None:
        with contextlib.suppress(InputError):  # HDF5 that cannot be read without
            plain = _films_at(dataclasses.replace(source, value_range=None), files, table, rows)
            both = zip(plain, _films_at(source, files, table, rows), strict=True)
            found = [pair for pair in both if not all(isinstance(film, Fault) for film in pair)]
            if found and all(np.array_equal(*pair) for pair in found):
                yield (
                    f"--value-range changes none of {len(found)} films looked at{whose}: those of 8 bits take one "
                    "within 0 255, DICOM has its own"
                )
    elif source.images is not None:
        lacking = sum(film is Fault.NO_RANGE for film in _films_at(source, files, table, rows))
        if lacking and lacking == len(rows):
            raise InputError(
                f"each of {len(rows)} films looked at has more than 8 bits and no value in the upper half of 16; say "
                "with --value-range LO HI which values are black and white (0 4095 for 12 bits)"
            )
        if lacking:
            yield f"{lacking} of {len(rows)} films looked at{whose} will be rejected: {Fault.NO_RANGE.reason}"


def _films_at(source: SourceConfig, files: tuple[H5File, ...], table: SourceTable, rows: Sequence[int]) -> list[Film]:
    with open_films(source, files, table.names) as films:
        return [film for row in rows for film in films.read(row, row + 1)]


def _stack_labels(tables: Sequence[SourceTable], names: tuple[str, ...]) -> NDArray[np.float32]:
    unknown = {table.rows: np.full(table.rows, np.nan, dtype=np.float32) for table in tables}
    columns = [np.concatenate([table.labels.get(name, unknown[table.rows]) for table in tables]) for name in names]
    rows = sum(table.rows for table in tables)
    return np.stack(columns, axis=1) if columns else np.empty((rows, 0), dtype=np.float32)
