"""What whoever starts an ingest should read before it goes on: files out of order, what --value-range does to films."""

import contextlib
import dataclasses
import itertools
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ingest.config import SourceConfig
from ingest.films import Film, H5File, open_films
from ingest.images import Fault
from ingest.table import SourceTable
from shards.errors import InputError

_NUMBER = re.compile(r"(\d+)")
_LOOKED_AT, _LOOK_S = 64, 5.0
"""Films of a source that tell what --value-range does, and the seconds that more than an eighth of them may take."""


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


def range_lines(source: SourceConfig, files: tuple[H5File, ...], table: SourceTable, whose: str) -> Iterator[str]:
    """What --value-range, given or not, does to films looked at that a user has to hear of at once.

    InputError where they all need one: later it would be another ingest's setting.
    """
    if source.value_range is not None:
        looked = unchanged = washed = 0
        try:
            for plain, film in _films_at((dataclasses.replace(source, value_range=None), source), files, table):
                if isinstance(film, Fault):
                    continue
                looked += 1
                unchanged += np.array_equal(plain, film)
                washed += not isinstance(plain, Fault) and _is_washed(plain, film)
        except InputError:  # HDF5 with a film that cannot be read without
            unchanged = 0
        if looked and unchanged == looked:
            yield (
                f"--value-range changes none of {looked} films looked at{whose}: those of 8 bits take one "
                "within 0 255, DICOM has its own"
            )
        if washed:
            yield (
                f"--value-range makes {washed} of {looked} films looked at{whose} black and white, which have grey "
                "levels without it: is it of others? Those want a source of their own (--sources)"
            )
    elif source.images is not None:
        faults = [film is Fault.NO_RANGE for (film,) in _films_at((source,), files, table)]
        if all(faults):
            raise InputError(
                f"each of {len(faults)} films looked at has more than 8 bits and no value in the upper half of 16; say "
                "with --value-range LO HI which values are black and white (0 4095 for 12 bits)"
            )
        if any(faults):
            yield f"{sum(faults)} of {len(faults)} films looked at{whose} will be rejected: {Fault.NO_RANGE.reason}"


def _is_washed(plain: NDArray[np.uint8], film: NDArray[np.uint8]) -> bool:
    """Whether most pixels of the film that are grey without a range are black or white with it."""
    grey = film[(plain > 0) & (plain < 255)]
    return bool(np.isin(grey, (0, 255)).sum() > len(grey) / 2)


def _films_at(
    sources: Sequence[SourceConfig], files: tuple[H5File, ...], table: SourceTable
) -> Iterator[tuple[Film, ...]]:
    """Films of 64 rows, spread evenly, as each of the sources, one with different settings, reads them.

    Large ones take a second each: an eighth of them, spread evenly too, and of the others what seconds give.
    """
    rows = range(0, table.rows, -(-table.rows // _LOOKED_AT))
    until = time.monotonic() + _LOOK_S
    with contextlib.ExitStack() as stack:
        films = [stack.enter_context(open_films(source, files, table.names)) for source in sources]
        for number, row in enumerate(itertools.chain.from_iterable(rows[first::8] for first in range(8))):
            if number >= len(rows) / 8 and time.monotonic() > until:
                return
            yield tuple(film for each in films for film in each.read(row, row + 1))
