"""Open shards, shared by the reading threads: a bounded number of files, and the rows of short blocks kept."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from pipeline.read import OpenShard, ReadStats
from shards.reader import Rows, ShardReader
from shards.schema import Manifest, ShardInfo

MAX_OPEN_SHARDS = 256
"""Kept open at once, two file descriptors each."""
ROWS_KEPT = 65_536
"""Rows (without images, about 250 bytes each) kept for the next visit to their block: a row group costs 0.55 ms to
read, a tenth of all work in a small set of short blocks. A large set does not come back to a block this soon."""


class OpenShards:
    """The shards of one split, opened when first used, the longest unused closed when there are many."""

    def __init__(self, root: Path, manifest: Manifest, shards: tuple[ShardInfo, ...]) -> None:
        self.stats = ReadStats()
        self._root, self._manifest, self._shards = root, manifest, shards
        self._open: OrderedDict[int, tuple[OpenShard, int]] = OrderedDict()
        self._rows: OrderedDict[tuple[int, int], Rows] = OrderedDict()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def use(self, number: int) -> Iterator[OpenShard]:
        """A shard, kept from being closed while in use. InputError where it is not the one the manifest describes."""
        with self._lock:
            shard, users = self._open.get(number) or (self._open_shard(number), 0)
            self._open[number] = shard, users + 1
            self._open.move_to_end(number)
        try:
            yield shard
        finally:
            with self._lock:
                shard, users = self._open[number]
                self._open[number] = shard, users - 1
                self._close_unused()

    def rows(self, shard: OpenShard, number: int, block: int) -> Rows:
        """The rows of a block of a shard in use, from those kept if they are there."""
        with self._lock:
            rows = self._rows.pop((number, block), None)
        rows = shard.read_rows(block) if rows is None else rows
        with self._lock:
            self._rows[number, block] = rows
            while len(self._rows) * self._manifest.block_rows > ROWS_KEPT:
                self._rows.popitem(last=False)
        return rows

    def close(self) -> None:
        """Close all files."""
        for shard, _ in self._open.values():
            shard.close()
        self._open.clear()

    def _open_shard(self, number: int) -> OpenShard:
        return OpenShard(ShardReader(self._root, self._manifest, self._shards[number]), self.stats)

    def _close_unused(self) -> None:
        unused = [number for number, (_, users) in self._open.items() if not users]
        for number in unused[: max(0, len(self._open) - MAX_OPEN_SHARDS)]:
            self._open.pop(number)[0].close()
