"""Open shards, shared by the reading threads: a bounded number of files, and the rows of short blocks kept.

A shard is opened outside the common lock, so that one that hangs holds up its own readers alone. Copies on the node are
taken as soon as they are there; one that proves damaged is not trusted again.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from pipeline.read import OpenShard, ReadStats
from pipeline.records import Records, block_records
from pipeline.stage import Stage
from pipeline.stall import Busy
from shards.errors import InputError
from shards.reader import ShardReader
from shards.schema import Manifest, ShardInfo

MAX_OPEN_SHARDS = 256
"""Kept open at once, two file descriptors each."""
ROWS_KEPT = 65_536
"""Rows (without images, about 250 bytes each) kept for the next visit to their block: a row group costs 0.55 ms to
read, a tenth of all work in a small set of short blocks. A large set does not come back to a block this soon."""


class _Entry:
    """A shard that is open or being opened, and how many are at it."""

    def __init__(self) -> None:
        self.shard: OpenShard | None = None
        self.users = 0
        self.lock = threading.Lock()


class OpenShards:
    """The shards of one split, opened when first used, the longest unused closed when there are many."""

    def __init__(
        self, root: Path, manifest: Manifest, shards: tuple[ShardInfo, ...], copies: Stage | None = None
    ) -> None:
        self.stats, self.busy, self.copies = ReadStats(), Busy(), copies
        self._root, self._manifest, self._shards = root, manifest, shards
        self._open: OrderedDict[tuple[int, bool], _Entry] = OrderedDict()
        self._rows: OrderedDict[tuple[int, int], Records] = OrderedDict()
        self._lock = threading.Lock()

    def name(self, number: int) -> str:
        """Name of a shard."""
        return self._shards[number].name

    def has_copy(self, number: int) -> bool:
        """Whether a copy of a shard is on this node."""
        return self.copies is not None and self.copies.has(number)

    @contextlib.contextmanager
    def use(self, number: int, *, staged: bool = False) -> Iterator[OpenShard]:
        """A shard, or its copy, kept from being closed while in use. InputError where it is not the manifest's."""
        key = number, staged
        with self._lock:
            entry = self._open.setdefault(key, _Entry())
            entry.users += 1
            self._open.move_to_end(key)
        try:
            with entry.lock:
                entry.shard = entry.shard or self._open_shard(*key)
            yield entry.shard
        finally:
            with self._lock:
                entry.users -= 1
                if not entry.users and entry.shard is not None:
                    entry.shard.close_stale()
                self._close_unused()

    def records(self, shard: OpenShard, number: int, block: int) -> Records:
        """The records of a block of a shard in use, from those kept if they are there."""
        with self._lock:
            records = self._rows.pop((number, block), None)
        if records is None:
            records = block_records(shard.read_rows(block), self._manifest, block * self._manifest.block_rows)
        with self._lock:
            self._rows[number, block] = records
            while len(self._rows) * self._manifest.block_rows > ROWS_KEPT:
                self._rows.popitem(last=False)
        return records

    def distrust(self, number: int, why: InputError) -> None:
        """Read a shard from the shared folder from now on."""
        assert self.copies is not None
        self.copies.distrust(number, str(why))
        with self._lock:
            for key in [key for key in self._rows if key[0] == number]:
                del self._rows[key]

    def close(self) -> None:
        """Close all files."""
        for entry in self._open.values():
            if entry.shard is not None:
                entry.shard.close()
        self._open.clear()

    def _open_shard(self, number: int, staged: bool) -> OpenShard:
        info = self._shards[number]
        root = self.copies.root if staged and self.copies is not None else self._root
        with self.busy.doing(f"opening {info.name}"):
            return OpenShard(lambda: ShardReader(root, self._manifest, info), self.stats, self.busy, staged=staged)

    def _close_unused(self) -> None:
        unused = [key for key, entry in self._open.items() if not entry.users]
        for key in unused[: max(0, len(self._open) - MAX_OPEN_SHARDS)]:
            entry = self._open.pop(key)
            if entry.shard is not None:
                entry.shard.close()
