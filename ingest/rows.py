"""What is known of every row besides its film, in the work folder: tasks carry row numbers, memory holds no tokens.

`rows.bin` has a record of fixed size for each row, `texts.bin` the reports end to end, both in the order in which the
shards will have them; `rows.json`, written last, says how to read them and holds their digests. Written while the films
are being encoded, read from one end to the other in phase two.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_128

from ingest.tokenizer import Tokenizer
from shards.atomic import atomic_file, write_atomic
from shards.digest import HashingFile, file_digest
from shards.errors import InputError
from shards.schema import TokenizerSpec

_SIDES = re.compile(
    r"\b(?:left|right|lt|rt|[lr]|lul|lll|rul|rml|rll|lingula\w*|dextro\w*|l[ae]vo\w*|situs)(?:ward|wards|sided)?\b",
    re.IGNORECASE,
)
RECORDS, TEXTS, NOTE = "rows.bin", "texts.bin", "rows.json"
_CHUNK = 4096
"""Rows written and read at once."""
_MOST_TEXT = 64 << 20
"""Bytes of reports read at once; larger ones are read one by one."""
_LAYOUT = 3
"""Grows when the files change, so that an ingest that an older version began makes them anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reports:
    """What phase two needs to know of all rows of all sources."""

    order: NDArray[np.int64]
    """(places,) the rows to write, in the order of the shards, films that will be rejected included."""
    texts: pa.ChunkedArray
    """(rows,) reports."""
    groups: NDArray[np.int64]
    """(rows,)"""
    labels: NDArray[np.float32]
    """(rows, labels), NaN for unknown."""


class Row(NamedTuple):
    """What phase two takes of a row: the last fields of a `shards.writer.Sample`, in their order."""

    text: str
    tokens: NDArray[np.uint16]
    token_count: int
    truncated: bool
    side_words: bool
    group: int
    labels: tuple[float | None, ...]
    """None for unknown."""


def names_side(text: str) -> bool:
    """Whether a report names a side of the body, so that its film must not be mirrored (the flip guard).

    Errs towards yes: `right heart border` counts as well as `right-sided effusion`.
    """
    return _SIDES.search(text) is not None


def record_type(context: int, labels: int) -> np.dtype:
    """A row's record in `rows.bin`."""
    return np.dtype(
        [
            ("text_at", "<i8"),  # in texts.bin, bytes
            ("text_size", "<i8"),
            ("tokens", "<u2", (context,)),
            ("token_count", "<u2"),
            ("truncated", "?"),
            ("side_words", "?"),
            ("group", "<i8"),
            ("labels", "<f4", (labels,)),
        ]
    )


def write_rows(work: Path, reports: Reports) -> TokenizerSpec:
    """Tokenise all reports and write the three files, unless they are there and whole."""
    tokenizer = Tokenizer()
    note = {"layout": _LAYOUT, "tokenizer": asdict(tokenizer.spec), "labels": reports.labels.shape[1]}
    note["texts"] = _texts_digest(reports.texts)
    if not _is_whole(work, note):
        with atomic_file(work / RECORDS) as records, atomic_file(work / TEXTS) as texts:
            sinks = HashingFile(records), HashingFile(texts)
            for first in range(0, len(reports.order), _CHUNK):
                _write_chunk(reports, reports.order[first : first + _CHUNK], tokenizer, *sinks)
        note |= {RECORDS: sinks[0].digest.hex(), TEXTS: sinks[1].digest.hex()}
        write_atomic(work / NOTE, json.dumps(note).encode())
    return tokenizer.spec


def check_texts(work: Path, texts: pa.ChunkedArray) -> None:
    """InputError where an earlier run took other reports: the fingerprint of an ingest does not look into files of
    reports, and shards may be finished.
    """
    try:
        before = json.loads((work / NOTE).read_bytes())
    except (OSError, ValueError):  # nothing was made of them, or all of it is lost
        return
    if before.get("layout") == _LAYOUT and before.get("texts") != _texts_digest(texts):
        raise InputError(
            "reports changed since this ingest was begun; restore them, or empty the output folder to begin anew"
        )


def _texts_digest(texts: pa.ChunkedArray) -> str:
    """Of all texts one after the other, and of their lengths, however they are cut into chunks."""
    contents, lengths = xxh3_128(), xxh3_128()
    for chunk in texts.chunks:
        _, ends, content = chunk.buffers()
        ends = np.frombuffer(ends, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        lengths.update(np.diff(ends).tobytes())
        contents.update(memoryview(content or b"")[ends[0] : ends[-1]])
    return contents.hexdigest() + lengths.hexdigest()


def _write_chunk(
    reports: Reports, rows: NDArray[np.int64], tokenizer: Tokenizer, records: HashingFile, texts: HashingFile
) -> None:
    chunk = np.zeros(len(rows), dtype=record_type(tokenizer.spec.context, reports.labels.shape[1]))
    chunk["group"], chunk["labels"] = reports.groups[rows], reports.labels[rows]
    for record, text in zip(chunk, _take(reports.texts, rows), strict=True):
        record["text_at"] = texts.written
        record["tokens"], record["token_count"], record["truncated"] = tokenizer(text)
        record["side_words"] = names_side(text)
        record["text_size"] = texts.write(text.encode())
    records.write(chunk.tobytes())


def _take(texts: pa.ChunkedArray, rows: NDArray[np.int64]) -> Iterator[str]:
    """The texts of some rows. `ChunkedArray.take` would copy all of them into one chunk first."""
    chunks = texts.chunks  # a list that is made anew for each who asks
    starts = np.cumsum([0, *map(len, chunks)])
    numbers = np.searchsorted(starts, rows, side="right") - 1
    for number, row in zip(numbers.tolist(), (rows - starts[numbers]).tolist(), strict=True):
        yield chunks[number][row].as_py()


class RowReader:
    """What the work folder says of rows, in the order of the shards."""

    def __init__(self, work: Path) -> None:
        note = json.loads((work / NOTE).read_bytes())
        self._type = record_type(note["tokenizer"]["context"], note["labels"])
        self._stack = ExitStack()
        self._records, self._texts = (
            self._stack.enter_context(open(work / name, "rb", buffering=0)).fileno() for name in (RECORDS, TEXTS)
        )

    def read(self, places: NDArray[np.int64]) -> Iterator[Row]:
        """The row at each of the places, which ascend; 4,096 of them are held at a time."""
        size = self._type.itemsize
        for first in range(0, len(places), _CHUNK):
            wanted = places[first : first + _CHUNK]
            start, count = int(wanted[0]), int(wanted[-1] - wanted[0]) + 1
            records = np.frombuffer(os.pread(self._records, count * size, start * size), dtype=self._type)
            records = records[wanted - start]
            columns = (records[name].tolist() for name in ("token_count", "truncated", "side_words", "group"))
            labels = map(_known, records["labels"].tolist())
            yield from map(Row, self._read_texts(records), records["tokens"], *columns, labels)

    def _read_texts(self, records: NDArray[np.void]) -> Iterator[str]:
        start, end = int(records["text_at"][0]), int(records["text_at"][-1] + records["text_size"][-1])
        content = os.pread(self._texts, end - start, start) if end - start <= _MOST_TEXT else b""
        for at, size in zip(records["text_at"].tolist(), records["text_size"].tolist(), strict=True):
            text = content[at - start : at - start + size] if content else os.pread(self._texts, size, at)
            yield text.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _known(labels: list[float]) -> tuple[float | None, ...]:
    return tuple(None if value != value else value for value in labels)  # NaN is not itself


def _is_whole(work: Path, expected: dict) -> bool:
    """Whether an earlier run left these very files, to the last byte."""
    try:
        note = json.loads((work / NOTE).read_bytes())
        digests = {name: file_digest(work / name) for name in (RECORDS, TEXTS)}
    except (OSError, ValueError):
        return False
    return note == json.loads(json.dumps(expected)) | digests
