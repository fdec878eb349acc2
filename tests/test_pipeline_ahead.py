"""Reading ahead: threads sleep where those awake keep up, and nobody ever waits with all of them asleep."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline import blocks
from pipeline.blocks import BlockReader
from pipeline.buffers import HOLES, PAGE
from pipeline.order import Visit
from pipeline.visits import Loaded, Pool

SIZE = 4 * PAGE
"""Bytes of a visit."""
ROOM = 56
"""Visits that are admitted; an eighth of them, KEEPS_UP, are 7."""
MEMORY = ROOM * SIZE * HOLES // (HOLES - 1)


class Loader:
    """Loads visits of one page, without a file; notes which threads were at it."""

    def __init__(self) -> None:
        info = SimpleNamespace(name="train-000000", tar=SimpleNamespace(bytes=SIZE), rows=1.1)
        self.shards = SimpleNamespace(info=lambda _: info, sets=[], close=lambda: None, busy=blocks.stall.Busy())
        self.threads: list[int] = []
        self.hangs, self.released = -1, threading.Event()

    def load(self, visit: Visit, pool: Pool) -> list[Loaded]:
        self.threads.append(threading.get_ident())
        if visit.first == self.hangs:
            assert self.released.wait(600)
        elif visit.first == self.hangs + 1 and self.hangs >= 0:
            self.released.set()
        return [Loaded(visit=visit, images=[], records=np.empty(0), buffer=pool.take(SIZE))]


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[BlockReader]:
    """Two threads, endless visits. Whoever waits for one has a thread at work."""
    wait = BlockReader._wait

    def wait_for_somebody(self: BlockReader, slot: blocks._Slot) -> None:
        assert asleep(self) < 2
        wait(self, slot)

    monkeypatch.setattr(BlockReader, "_wait", wait_for_somebody)
    visits = (Visit(first=first, step=1, shard=0, block=first, rows=np.zeros(1, np.int64)) for first in range(10_000))
    reader = BlockReader(Loader(), visits, MEMORY, threads=2, stall_abort_s=30)  # type: ignore[arg-type]
    until_asleep(reader)
    yield reader
    reader.close()


def asleep(reader: BlockReader) -> int:
    """Threads that wait for room."""
    return len(reader._room._waiters)  # type: ignore[attr-defined]


def until_asleep(reader: BlockReader) -> None:
    end = time.monotonic() + 300
    while True:
        with reader._lock:
            if asleep(reader) == 2:
                return
        assert time.monotonic() < end


def loads(reader: BlockReader) -> list[int]:
    return reader.loader.threads  # type: ignore[attr-defined,no-any-return]


def test_threads_sleep_until_an_eighth_of_the_memory_is_free_and_then_one_wakes(reader: BlockReader) -> None:
    assert len(loads(reader)) == ROOM
    for _ in range(6):
        reader.release(reader.get())
    with reader._lock:
        assert asleep(reader) == 2 and len(loads(reader)) == ROOM
    reader.release(reader.get())
    until_asleep(reader)
    assert len(loads(reader)) == ROOM + 7 and len(set(loads(reader)[ROOM:])) == 1


def test_one_that_wakes_wakes_another_where_a_quarter_is_free(reader: BlockReader) -> None:
    """The first hangs at its visit until the other reads the one behind."""
    reader.loader.hangs = ROOM  # type: ignore[attr-defined]
    held = [part for _ in range(ROOM) for part in reader.get()]
    reader.release(held[:20])
    until_asleep(reader)
    assert len(set(loads(reader)[ROOM:])) == 2


def test_whoever_holds_most_of_the_memory_never_waits_with_all_threads_asleep(
    reader: BlockReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many streams' visits do: an eighth is never free."""
    monkeypatch.setattr(blocks, "STARVES_S", 60)
    held: deque[Loaded] = deque()
    for number in range(600):
        held += reader.get()
        assert held[-1].visit.first == number
        if len(held) == ROOM - 6:
            reader.release([held.popleft()])


def test_whoever_holds_all_of_it_gets_one_visit_after_the_other(reader: BlockReader) -> None:
    held = [part for _ in range(ROOM + 9) for part in reader.get()]
    assert [each.visit.first for each in held] == list(range(ROOM + 9))
    until_asleep(reader)
    assert len(loads(reader)) == ROOM + 9


def test_all_threads_wake_for_a_visit_that_is_waited_for_too_long(
    reader: BlockReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first thread hangs at it until the other reads the one behind, for which there is room for long."""
    monkeypatch.setattr(blocks, "STARVES_S", 0.01)
    reader.loader.hangs = ROOM  # type: ignore[attr-defined]
    held = [part for _ in range(ROOM) for part in reader.get()]
    reader.release(held[:7])
    assert reader.get()[0].visit.first == ROOM
    assert len(set(loads(reader)[ROOM:])) == 2


def test_memory_that_was_planned_for_is_free_again_where_reading_fails(
    reader: BlockReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> list[Loaded]:
        raise OSError("no")

    monkeypatch.setattr(reader.loader, "load", fail)
    held = [part for _ in range(ROOM) for part in reader.get()]
    reader.release(held)
    with pytest.raises(OSError, match="no"):
        reader.get()
    until_failed = [thread.join(600) for thread in reader._threads]
    assert until_failed and reader._pending == 0 and reader._buffers.used == 0
