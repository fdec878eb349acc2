"""Reports, labels and patients out of row-aligned CSV files.

Python's `csv` reads them, for it says which row is wrong; columns go to Arrow in chunks, so that half a million reports
take their UTF-8 size and not a Python string each. Nothing is ever skipped: a dropped line would pair every later film
with the wrong report.
"""

import csv
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.errors import InputError

MAX_FIELD = 16 << 20
"""Characters; a larger field is an unclosed quote far more often than a report."""
_NUMBER = re.compile(r"[0-9eE.+-]+")
"""Of what Python takes for a number, what a label is: no `1_0`, no digits of other scripts."""
_MOST = float(np.finfo(np.float32).max)
_CHUNK = 10_000
_LONGEST_NAME = 60
_DATA = re.compile(r"\d{3}|[.!?]\s|(\S+\s+){6}|^\s*-?[\d.]*\s*$")
"""What values have and names of columns do not: long numbers, sentences, a number alone, nothing."""


def read_columns(paths: tuple[Path, ...], names: tuple[str, ...]) -> dict[str, pa.ChunkedArray]:
    """The named columns of several CSV files that describe the same rows, as strings exactly as written.

    InputError where a file is missing or not UTF-8, a column is missing or stands in two files, or row counts differ.
    """
    headers = {path: _header(path) for path in paths}
    wanted = {name: _find(name, headers) for name in names}
    columns: dict[str, pa.ChunkedArray] = {}
    counts: dict[Path, int] = {}
    for path in paths:
        mine = [name for name in names if wanted[name] == path]
        counts[path], read = _read_file(path, headers[path], mine)
        columns |= read
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{path} has {count:,}" for path, count in counts.items())
        raise InputError(f"the CSV files describe different numbers of rows: {found}; they must be row-aligned")
    return columns


def parse_label(name: str, column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A label column to float32 (rows,), blank to NaN. InputError names column and row of anything else."""
    values = np.empty(len(column), dtype=np.float32)
    for row, text in enumerate(strings(column)):
        values[row] = _label(text, name, row)
    return values


def _label(text: str, name: str, row: int) -> float:
    if not text.strip():
        return math.nan
    try:
        value = float(text) if _NUMBER.fullmatch(text.strip()) else math.nan
    except ValueError:
        value = math.nan
    if not abs(value) <= _MOST:
        raise InputError(f"row {row} of label column {name!r} is neither a number nor blank; correct the CSV")
    return value


def strings(column: pa.ChunkedArray) -> Iterator[str]:
    """The values of a column one by one."""
    for chunk in column.chunks:
        yield from chunk.to_pylist()


def _header(path: Path) -> list[str]:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is a pipe or a device; it is read more than once, so save it as a file")
    try:
        # What follows the header is read with it; whatever is wrong there is said of its own row.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header = next(csv.reader(file), [])
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from None
    except csv.Error:
        header = ["\udc80"]
    if _is_foreign(header):
        raise InputError(f"the header of {path} is not CSV in UTF-8; convert it (iconv -t UTF-8)")
    if not header:
        raise InputError(f"{path} is empty; it needs a header line")
    if len(set(header)) != len(header):
        raise InputError(f"{path} names a column twice in its header; rename one")
    return header


def _find(name: str, headers: dict[Path, list[str]]) -> Path:
    found = [path for path, header in headers.items() if name in header]
    if not found:
        known = "; ".join(f"{path.name}: {_describe(header)}" for path, header in headers.items())
        raise InputError(f"no column {name!r} in the CSV; columns are {known}")
    if len(found) > 1:
        raise InputError(f"column {name!r} stands in {' and '.join(map(str, found))}; rename one")
    return found[0]


def _describe(header: list[str]) -> str:
    """The columns, for a message. A file without a header has a patient and a report in its first line instead."""
    if len(header) == 1 and (other := next((mark for mark in ";\t" if mark in header[0]), None)):
        return f"one column, and {other!r} in its name; save it with commas"
    if any(len(name) > _LONGEST_NAME or _DATA.search(name) for name in header):
        return f"{len(header):,}, whose first line does not read like names; add a header line"
    return ", ".join(header[:30])


def _read_file(path: Path, header: list[str], names: list[str]) -> tuple[int, dict[str, pa.ChunkedArray]]:
    """Number of data rows, and the wanted columns."""
    indices = [header.index(name) for name in names]
    chunks: list[list[pa.Array]] = [[] for _ in names]
    pending: list[list[str]] = [[] for _ in names]
    count = 0
    for row in _rows(path, len(header)):
        count += 1
        for values, index in zip(pending, indices, strict=True):
            values.append(row[index])
        if count % _CHUNK == 0:
            _flush(pending, chunks)
    _flush(pending, chunks)
    return count, {name: pa.chunked_array(parts, pa.large_string()) for name, parts in zip(names, chunks, strict=True)}


def _flush(pending: list[list[str]], chunks: list[list[pa.Array]]) -> None:
    for values, parts in zip(pending, chunks, strict=True):
        parts.append(pa.array(values, pa.large_string()))
        values.clear()


def _rows(path: Path, width: int) -> Iterator[list[str]]:
    """Data rows of one file, each checked to have `width` fields; blank lines may only end the file."""
    csv.field_size_limit(MAX_FIELD)
    number, blank = -1, None
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            next(reader)
            for number, row in enumerate(reader):
                if not row and width == 1:
                    row = [""]  # the one field of a one-column file, empty
                if not row:
                    blank = number if blank is None else blank
                    continue
                if blank is not None:
                    raise InputError(f"row {blank} of {path} is blank; remove the line or fill it in")
                if len(row) != width:
                    raise InputError(
                        f"row {number} of {path} has {len(row)} fields, its header has {width}; mend the row"
                    )
                yield row
    except UnicodeDecodeError:
        raise InputError(
            f"row {_foreign_row(path)} of {path} is not UTF-8; convert the file (iconv -t UTF-8)"
        ) from None
    except csv.Error as error:
        raise InputError(f"row {number + 1} of {path} is not CSV ({error}); mend the row") from None


def _foreign_row(path: Path) -> int:
    """The first row with bytes that are not UTF-8."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        next(reader)
        for number, row in enumerate(reader):
            if _is_foreign(row):
                return number
    raise AssertionError("every row is UTF-8")


def _is_foreign(row: list[str]) -> bool:
    """Whether a row read with `surrogateescape` has bytes that are not UTF-8."""
    return any("\udc80" <= letter <= "\udcff" for field in row for letter in field)
