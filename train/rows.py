"""The rows of a run: metrics.jsonl, written, cut back and read. Without torch, which takes seconds to load."""

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, TypeGuard

from shards.atomic import write_atomic

Row = dict[str, Any]


class JsonLines:
    """metrics.jsonl, one object a line. A number that is none (NaN, infinite) is written as null, as JSON wants it.

    A full disk ends nothing: rows are kept until one can be written, and it is said once.
    """

    def __init__(self, path: Path, done: int) -> None:
        trim(path, done)
        self._file = open(path, "r+b", buffering=0)
        self._end = path.stat().st_size
        self._pending = b""
        self._warned = False

    def write(self, row: Row) -> None:
        """Append a row, and those that could not be written before it."""
        self._pending += _encode(row).encode()
        try:
            # At a place of its own: what a write that failed half-way left there is overwritten by the next.
            while self._pending:
                written = os.pwrite(self._file.fileno(), self._pending, self._end)
                self._end, self._pending = self._end + written, self._pending[written:]
        except OSError as error:
            if not self._warned:
                sys.stderr.write(f"warning: cannot write metrics.jsonl ({error.strerror}); rows are kept for later\n")
            self._warned = True

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line that a kill cut short, and what is no row, is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def films_since(rows: list[Row]) -> int:
    """The step after which a run went on with the films of its last row (--force); 0 where it never changed them."""
    since = rows[-1].get("films_since") if rows else None
    return since if isinstance(since, int) else 0


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a figure of a row, which anybody may have written, is a finite number, and not too large to sum up."""
    return isinstance(value, int | float) and abs(value) < 1e300


def trim(path: Path, step: int) -> None:
    """Leave the rows up to a step only, atomically."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    write_atomic(path, "".join(_encode(row) for row in rows).encode())


def _encode(row: Row) -> str:
    known = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(known, allow_nan=False) + "\n"
