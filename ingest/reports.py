"""Columns out of row-aligned CSV files; report files; one section of a full report, plain text or Indiana's XML.

Python's `csv` reads them, for it says which row is wrong; columns go to Arrow in chunks, so that half a million reports
take their UTF-8 size and not a Python string each. Nothing is ever skipped: a dropped line would pair every later film
with the wrong report.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa

from shards.errors import InputError

MAX_FIELD = 16 << 20
"""Characters; a larger field is an unclosed quote far more often than a report."""
_CHUNK = 10_000
_LONGEST_NAME = 60
_DATA = re.compile(r"\d{3}|[.!?]\s|(\S+\s+){6}|^\s*-?[\d.]*\s*$")
"""What values have and names of columns do not: long numbers, sentences, a number alone, nothing."""
_HEADING = re.compile(r"(?:^|(?<=[\n.]))[ \t]*([A-Z][A-Za-z]*(?:[ /&-][A-Za-z]+){0,4})[ \t]*:", re.MULTILINE)
"""A heading stands at the start of a line or after a full stop and ends with a colon."""
MAX_REPORT_BYTES = 1 << 20
_NO_TEXT = {
    b"\x89HDF": "it is HDF5, which --h5 takes",
    b"PK\x03\x04": "it is a workbook or a zip file; save it as CSV",
    b"\x1f\x8b": "it is compressed; gunzip it",
    b"PAR1": "it is Parquet; save it as CSV",
}
"""How files begin that are no CSV, and what to do with them."""
_SECTIONS = frozenset(
    "findings impression recommendation recommendations technique comparison history indication examination exam "
    "conclusion addendum procedure reason notification wet_read clinical_history clinical_indication "
    "clinical_information reason_for_exam reason_for_examination final_report final_impression".split()
)
"""What reports call their sections, `_` for a space: these are headings in whatever letters."""


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


def strings(column: pa.ChunkedArray) -> Iterator[str]:
    """The values of a column one by one."""
    for chunk in column.chunks:
        yield from chunk.to_pylist()


def _header(path: Path) -> list[str]:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is a pipe or a device; it is read more than once, so save it as a file")
    try:
        if advice := _no_text(path):
            raise InputError(f"{path} is not CSV in UTF-8; {advice}")
        # What follows the header is read with it; whatever is wrong there is said of its own row.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header = next(csv.reader(file), [])
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); mend that, or give another --csv") from None
    except csv.Error:
        header = ["\udc80"]
    if _is_foreign(header):
        raise InputError(f"the header of {path} is not CSV in UTF-8; {_conversion(path)}")
    if not header:
        raise InputError(f"{path} is empty; it needs a header line")
    named = [name for name in header if name.strip()]  # Excel writes empty columns, with names as empty
    if len(set(named)) != len(named):
        raise InputError(f"{path} names a column twice in its header; rename one")
    return header


def _no_text(path: Path) -> str | None:
    """What to do with a file that begins as no CSV does."""
    start = _start(path)
    return next((advice for signature, advice in _NO_TEXT.items() if start.startswith(signature)), None)


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4)


def _conversion(path: Path) -> str:
    """How to make UTF-8 of a text file, which is from Windows in most cases."""
    wide = _start(path)[:2] in (b"\xff\xfe", b"\xfe\xff")
    return f"convert it (iconv -f {'UTF-16' if wide else 'CP1252, or what it is in,'} -t UTF-8 OLD > NEW)"


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
    if any(len(name) > _LONGEST_NAME or _DATA.search(name) for name in header if name.strip()):
        return f"{len(header):,}, whose first line does not read like names; add a header line"
    return ", ".join(name if name == name.strip() else repr(name) for name in header[:30])


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
        raise InputError(f"row {_foreign_row(path)} of {path} is not UTF-8; {_conversion(path)}") from None
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


def cut_section(report: str, section: str) -> str:
    """The text of a section, stripped; empty where the report has none. A report in XML is recognised by its beginning.

    In plain text a section runs from its heading, whatever its case, to the next heading: words in capitals, or one of
    the usual names of sections. `FINAL IMPRESSION` and `IMPRESSIONS` count as `impression`, `CLINICAL ...` does not.
    """
    if is_xml(report):
        return _cut_xml(report, section)
    headings = [match for match in _HEADING.finditer(report) if _is_heading(match[1], section)]
    parts = []
    for number, match in enumerate(headings):
        if _names(match[1], section):
            end = headings[number + 1].start() if number + 1 < len(headings) else len(report)
            parts.append(report[match.end() : end].strip())
    return "\n".join(part for part in parts if part)


def is_xml(report: str) -> bool:
    """Whether a report begins as XML does."""
    return report.lstrip("\ufeff \t\r\n").startswith("<")


def _is_heading(words: str, section: str) -> bool:
    """Capitals, a usual name, or the wanted section itself; `Heart size: normal` inside a section is no heading."""
    return words.isupper() or words.lower().replace(" ", "_") in _SECTIONS or _names(words, section)


def _names(words: str, section: str) -> bool:
    heading, wanted = words.lower(), section.lower()
    if heading.startswith("clinical ") and not wanted.startswith("clinical "):
        return False  # why the film was made, not what it shows
    return heading in (wanted, f"{wanted}s") or heading.endswith((f" {wanted}", f" {wanted}s"))


def _cut_xml(report: str, section: str) -> str:
    # Entities could name other files or grow without end; radiology reports have none.
    if "<!DOCTYPE" in report or "<!ENTITY" in report:
        return ""
    try:
        root = ElementTree.fromstring(report.encode())
    except (ElementTree.ParseError, ValueError, LookupError):  # the latter two for an encoding it cannot read
        return ""
    texts = [node.text or "" for node in root.iter("AbstractText") if node.get("Label", "").lower() == section.lower()]
    return "\n".join(text.strip() for text in texts if text.strip())


def read_report(folder: Path, name: str) -> str | None:
    """Content of a report file inside `folder`; None where it is missing, leads outside, is too large or not UTF-8."""
    if not name.strip() or "\0" in name:
        return None
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():  # a pipe would never end
            return None
        with open(path, "rb") as file:
            content = file.read(MAX_REPORT_BYTES + 1)
        return content.decode("utf-8-sig") if len(content) <= MAX_REPORT_BYTES else None
    except (OSError, RuntimeError, UnicodeDecodeError):  # RuntimeError: links in a circle
        return None
