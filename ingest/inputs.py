"""Everything that is read before the first film: tables of all sources, what their films look like, the plan."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ingest.config import IngestConfig, SourceConfig
from ingest.films import H5File, H5Films
from ingest.notes import order_lines, range_lines
from ingest.plan import Plan, make_plan
from ingest.table import SourceTable, read_table
from shards.errors import InputError
from shards.schema import MAX_IMAGE_PIXELS, MAX_IMAGE_SIDE, MAX_LABELS

_MOST_NAMED = 4
"""Files that a message names."""


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
        notes += range_lines(source, found, table, of_source)
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


def _stack_labels(tables: Sequence[SourceTable], names: tuple[str, ...]) -> NDArray[np.float32]:
    unknown = {table.rows: np.full(table.rows, np.nan, dtype=np.float32) for table in tables}
    columns = [np.concatenate([table.labels.get(name, unknown[table.rows]) for table in tables]) for name in names]
    rows = sum(table.rows for table in tables)
    return np.stack(columns, axis=1) if columns else np.empty((rows, 0), dtype=np.float32)
