"""What to say, and when to give up, while a read does not come back.

A thread in a read that hangs cannot be stopped, so another one, which waits for it, keeps the time: a line after
STALL_REPORT_S, another each time the wait has doubled, an error after the limit. Time in which the whole process stood
still (SIGSTOP, a suspended job) does not count: each look at the clock adds a few ticks at most.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from shards.errors import InputError

log = logging.getLogger("shardclip")
STALL_REPORT_S = 5.0
"""Seconds of waiting after which a line says for what."""
TICK_S = 0.5
"""Seconds between looks at the clock."""
MOST_TICKS = 4
"""Ticks that one look can add."""


class Busy:
    """What each reading thread is at, for whoever waits for it."""

    def __init__(self) -> None:
        self._at: dict[int, tuple[str, float]] = {}

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Inside the block, this thread is at `what`."""
        thread = threading.get_ident()
        self._at[thread] = what, time.monotonic()
        try:
            yield
        finally:
            del self._at[thread]

    def longest(self) -> str:
        """What the thread is at that has been at it for longest; empty where none is at anything."""
        now = time.monotonic()
        what, since = min(tuple(self._at.values()), key=lambda each: each[1], default=("", now))
        return f"{what} for {now - since:.0f} s" if what else ""


class Patience:
    """One wait, for a shard's block above all."""

    def __init__(self, what: str, busy: Busy, limit_s: float) -> None:
        """`what` is waited for; `limit_s`: seconds after which `look` raises; 0: never."""
        self._what, self._busy, self._limit = what, busy, limit_s
        self._waited, self._next_report = 0.0, STALL_REPORT_S
        self._last = time.monotonic()

    def look(self) -> None:
        """Look at the clock. Logs a line when one is due; InputError when the limit is reached."""
        now = time.monotonic()
        self._waited += min(now - self._last, MOST_TICKS * TICK_S)
        self._last = now
        if self._limit and self._waited >= self._limit:
            raise InputError(
                f"{self._what} did not come within {self._limit:g} s{self._reason()}; check the file system, "
                "or allow more (stall_abort_s)"
            )
        if self._waited >= self._next_report:
            log.warning("waiting for %s since %.0f s%s", self._what, self._waited, self._reason())
            self._next_report *= 2

    def end(self) -> None:
        """What was waited for is there."""
        if self._next_report > STALL_REPORT_S:  # there was a line
            log.warning("%s came after %.0f s", self._what, self._waited)

    def _reason(self) -> str:
        longest = self._busy.longest()
        return f" (a thread is {longest})" if longest else ""


@contextlib.contextmanager
def told(what: str, busy: Busy) -> Iterator[None]:
    """Say what is waited for where the block takes long; it may take for ever. That it came is said where it did."""
    over, patience = threading.Event(), Patience(what, busy, 0)

    def watch() -> None:
        while not over.wait(TICK_S):
            patience.look()

    watcher = threading.Thread(target=watch, name="shardclip-told", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    patience.end()
