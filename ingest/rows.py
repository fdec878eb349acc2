"""What is known of every row besides its film, in the work folder: tasks carry row numbers, memory holds no tokens.

`rows.bin` has a record of fixed size for each row, `texts.bin` the reports end to end; `rows.json`, written last, says
how to read them and holds their digests. Written while the films are being encoded, read row by row in phase two.
"""

import json
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ingest.text import names_side
from ingest.tokenizer import Tokenizer
from shards.atomic import atomic_file, write_atomic
from shards.digest import HashingFile, file_digest
from shards.schema import TokenizerSpec

RECORDS, TEXTS, NOTE = "rows.bin", "texts.bin", "rows.json"
_CHUNK = 4096
"""Rows written at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reports:
    """What phase two needs to know of all rows of all sources."""

    texts: pa.ChunkedArray
    """(rows,) reports."""
    wanted: NDArray[np.bool_]
    """(rows,) rows that have one; of the others nothing is written but zeros."""
    groups: NDArray[np.int64]
    """(rows,)"""
    labels: NDArray[np.float32]
    """(rows, labels), NaN for unknown."""


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
    note = {"tokenizer": asdict(tokenizer.spec), "labels": reports.labels.shape[1]}
    if not _is_whole(work, note):
        with atomic_file(work / RECORDS) as records, atomic_file(work / TEXTS) as texts:
            sinks = HashingFile(records), HashingFile(texts)
            for first in range(0, len(reports.texts), _CHUNK):
                _write_chunk(reports, first, tokenizer, *sinks)
        note |= {RECORDS: sinks[0].digest.hex(), TEXTS: sinks[1].digest.hex()}
        write_atomic(work / NOTE, json.dumps(note).encode())
    return tokenizer.spec


def _write_chunk(reports: Reports, first: int, tokenizer: Tokenizer, records: HashingFile, texts: HashingFile) -> None:
    chunk = slice(first, min(first + _CHUNK, len(reports.texts)))
    rows = np.zeros(chunk.stop - first, dtype=record_type(tokenizer.spec.context, reports.labels.shape[1]))
    rows["group"], rows["labels"] = reports.groups[chunk], reports.labels[chunk]
    for row, text in zip(rows, reports.texts.slice(first, len(rows)).to_pylist(), strict=True):
        row["text_at"] = texts.written
        if reports.wanted[first]:
            row["tokens"], row["token_count"], row["truncated"] = tokenizer(text)
            row["side_words"] = names_side(text)
            row["text_size"] = texts.write(text.encode())
        first += 1
    records.write(rows.tobytes())


class RowReader:
    """Rows out of the work folder, one by one; nothing is held in memory."""

    def __init__(self, work: Path) -> None:
        note = json.loads((work / NOTE).read_bytes())
        self._type = record_type(note["tokenizer"]["context"], note["labels"])
        self._stack = ExitStack()
        self._records, self._texts = (
            self._stack.enter_context(open(work / name, "rb", buffering=0)).fileno() for name in (RECORDS, TEXTS)
        )

    def read(self, row: int) -> tuple[np.void, str]:
        """Record and report of a row, all sources counted through."""
        size = self._type.itemsize
        record = np.frombuffer(os.pread(self._records, size, row * size), dtype=self._type)[0]
        return record, os.pread(self._texts, int(record["text_size"]), int(record["text_at"])).decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _is_whole(work: Path, expected: dict) -> bool:
    """Whether an earlier run left these very files, to the last byte."""
    try:
        note = json.loads((work / NOTE).read_bytes())
        digests = {name: file_digest(work / name) for name in (RECORDS, TEXTS)}
    except (OSError, ValueError):
        return False
    return note == json.loads(json.dumps(expected)) | digests
