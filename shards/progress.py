"""How far long work has come, on stderr: a bar on a terminal, a line a minute in the log of a batch job."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

Advance = Callable[[int], object]
"""To call with the number of units done since its last call."""
LINE_S = 60.0
"""Seconds between lines."""


@contextlib.contextmanager
def progress(what: str, total: int, unit: str, *, keep: bool = False) -> Iterator[Advance]:
    """Gives what the work calls as it goes. `keep`: leave the bar at the end.

    Work of less than a minute leaves no line.
    """
    if not sys.stderr.isatty():
        yield _Lines(what, total, unit).advance
        return
    with tqdm(desc=what, total=total, unit=unit, mininterval=0.5, leave=keep, **terminal_size()) as bar:
        yield bar.update


class _Lines:
    """Says what is done, at the speed of the last minute."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = self._said = 0
        self._said_at = time.monotonic()

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._said_at < LINE_S:
            return
        speed = (self._done - self._said) / (now - self._said_at)
        left = f", {clock((self._total - self._done) / speed)} left" if speed else ""
        done = f"{self._done:,} of {self._total:,} {self._unit}s"
        with contextlib.suppress(OSError):  # a log whose disk is full, or whose reader has gone, ends no work
            sys.stderr.write(f"{self._what}: {done}, {speed:,.0f} a second{left}\n")
            sys.stderr.flush()
        self._said, self._said_at = self._done, now


def terminal_size() -> dict[str, Any]:
    """tqdm's settings of the terminal's size: as it is at any moment; what it does not say of 100 x 24, as one that a
    container, a batch job or `script` makes does not: tqdm would draw nothing there."""
    with contextlib.suppress(OSError, ValueError):
        columns, lines = os.get_terminal_size(sys.stderr.fileno())
        if not (columns and lines):
            return {"ncols": columns - 1 if columns > 1 else 100, "nrows": lines or 24}
    return {"dynamic_ncols": True}


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 where it is less than an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
