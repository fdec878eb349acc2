"""Open shards, shared by the reading threads: a bounded number of files, and the rows of small sets kept.

A shard is opened outside the common lock, so that one that hangs holds up its own readers alone. Copies on the node are
taken as soon as they are there; one that proves damaged is not trusted again. Where several data sets are mixed, shards
are numbered on through them.
"""

import bisect
import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.read import OpenShard, ReadStats
from pipeline.selection import Layout
from pipeline.stage import Stage
from pipeline.stall import Busy
from shards.errors import InputError
from shards.reader import Rows, ShardReader
from shards.schema import Manifest, ShardInfo, sample_key

Records = NDArray[np.void]
"""(n,) of `record_type`: what is known of samples, made once of a block, then copied in one go wherever they go."""

MAX_OPEN_SHARDS = 256
"""Kept open at once, two file descriptors each."""
ROWS_KEPT = 65_536
"""Rows (without images, about 250 bytes each) of small sets, the smallest first, that are all kept for the next visits
to their blocks: a row group costs 0.55 ms to read, a tenth of all work in a small set of short blocks. A larger set has
longer ones, and does not come back to a block before it is forgotten."""


def record_type(manifest: Manifest) -> np.dtype:
    """Fields of a record; of a block's records, `shard`, `planned` and `address` say nothing yet."""
    return np.dtype(
        [
            ("shard", np.int64),  # number in the split, or in the mixture
            ("row", np.int64),  # in the shard
            ("planned", np.int64),  # row that the order names; not `row` where that one is bad
            ("source", np.int64),  # with the next: the opaque key
            ("source_row", np.int64),
            ("offset", np.int64),  # first byte of the image in the tar
            ("address", np.int64),  # and in memory
            ("size", np.int64),  # bytes of the image
            ("xxh3", np.uint64),  # of them
            ("token_count", np.int64),
            ("side_words", np.bool_),
            ("labels", np.float32, (len(manifest.labels),)),
            ("tokens", np.uint16, (manifest.tokenizer.context,)),
        ],
        align=True,
    )


def block_records(rows: Rows, manifest: Manifest, first: int) -> Records:
    """Records of a block's rows, of which the first is row `first` of its shard."""
    records = np.zeros(len(rows), dtype=record_type(manifest))
    records["row"] = first + np.arange(len(rows))
    for name in ("source", "source_row", "offset", "size", "xxh3", "token_count", "side_words", "labels", "tokens"):
        records[name] = getattr(rows, name)
    return records


def key_of(record: np.void) -> str:
    """A sample's opaque key."""
    return sample_key(int(record["source"]), int(record["source_row"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSet:
    """A split of one data set."""

    root: Path
    """Folder of the data set."""
    manifest: Manifest
    shards: tuple[ShardInfo, ...]
    """Of the split."""
    layout: Layout
    """Their rows."""
    copies: Stage | None = None
    """Copies on the node."""

    @property
    def rows(self) -> int:
        """Of all shards."""
        return sum(shard.rows for shard in self.shards)


class _Entry:
    """A shard that is open or being opened, and how many are at it."""

    def __init__(self) -> None:
        self.shard: OpenShard | None = None
        self.users = 0
        self.lock = threading.Lock()


class OpenShards:
    """The shards of one split or more, opened when first used, the longest unused closed when there are many."""

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self.stats, self.busy, self.sets = ReadStats(), Busy(), sets
        self.first = (0, *itertools.accumulate(len(each.shards) for each in sets[:-1]))
        """Number of each set's first shard."""
        self._open: OrderedDict[tuple[int, bool], _Entry] = OrderedDict()
        self._rows: dict[tuple[int, int], Records] = {}
        sizes = sorted(each.rows for each in sets)
        fitting = [size for size, total in zip(sizes, itertools.accumulate(sizes), strict=True) if total <= ROWS_KEPT]
        self._most_kept = max(fitting, default=0)
        """Rows of the largest set whose rows are kept."""
        self._lock = threading.Lock()

    def find(self, number: int) -> tuple[ShardSet, int]:
        """The set of a shard, and the shard's number in it."""
        index = bisect.bisect(self.first, number) - 1
        return self.sets[index], number - self.first[index]

    def info(self, number: int) -> ShardInfo:
        """What the manifest says of a shard."""
        own, local = self.find(number)
        return own.shards[local]

    def has_copy(self, number: int) -> bool:
        """Whether a copy of a shard is on this node."""
        own, local = self.find(number)
        return own.copies is not None and own.copies.has(local)

    @property
    def staged(self) -> int:
        """Shards of which there are copies on the node."""
        return sum(each.copies.count() for each in self.sets if each.copies is not None)

    def candidates(self, number: int, block: int) -> NDArray[np.int64]:
        """The rows of a block, counted from its first, that may stand in for a bad one."""
        own, local = self.find(number)
        return own.layout.chosen_of(local, block)

    def block_rows(self, number: int) -> int:
        """Rows of a block of a shard."""
        return self.find(number)[0].manifest.block_rows

    @contextlib.contextmanager
    def use(self, number: int, *, staged: bool = False) -> Iterator[OpenShard]:
        """A shard, or its copy, kept from being closed while in use. InputError where it is not the manifest's."""
        key = number, staged
        with self._lock:
            entry = self._open.get(key) or self._open.setdefault(key, _Entry())
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
        records = self._rows.get((number, block))
        if records is None:
            own, _ = self.find(number)
            records = block_records(shard.read_rows(block), own.manifest, block * own.manifest.block_rows)
            if own.rows <= self._most_kept:
                self._rows[number, block] = records
        return records

    def distrust(self, number: int, why: InputError) -> None:
        """Read a shard from the shared folder from now on."""
        own, local = self.find(number)
        assert own.copies is not None
        own.copies.distrust(local, str(why))
        for key in [key for key in tuple(self._rows) if key[0] == number]:
            self._rows.pop(key, None)

    def close(self) -> None:
        """Close all files."""
        for entry in self._open.values():
            if entry.shard is not None:
                entry.shard.close()
        self._open.clear()

    def _open_shard(self, number: int, staged: bool) -> OpenShard:
        own, info = self.find(number)[0], self.info(number)
        root = own.copies.root if staged and own.copies is not None else own.root
        with self.busy.doing(f"opening {info.name}"):
            return OpenShard(lambda: ShardReader(root, own.manifest, info), self.stats, self.busy, staged=staged)

    def _close_unused(self) -> None:
        unused = [key for key, entry in self._open.items() if not entry.users]
        for key in unused[: max(0, len(self._open) - MAX_OPEN_SHARDS)]:
            entry = self._open.pop(key)
            if entry.shard is not None:
                entry.shard.close()
