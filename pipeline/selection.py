"""Which samples of a split there are, and which are used without writing its shards anew: by query and exclusion list.

    --where QUERY     samples for which a query of `shards.query` holds, e.g. "View == 1 and token_count > 5"
    --exclude FILE    all but the samples whose keys stand in a file, one `00-0000000123` a line; where several sets are
                      mixed, `2:00-0000000123` is of the second

The answer is one bit a sample, worked out once when a loader is built by reading the columns asked about, and no
others, of every block. `Layout` takes it: the order is then a pure function of the position as before, over
the rows that are left. Two loaders with the same shards, query and keys have the same bits.
"""

import bisect
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_64_hexdigest

from pipeline.read import ReadStats, retried
from shards.errors import InputError
from shards.query import parse_query
from shards.reader import ShardReader
from shards.schema import MAX_SOURCE_ROWS, Manifest, ShardInfo

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Result = TypeVar("Result")
Test = Callable[[pa.Table], Mask]
"""A table of n rows -> which of them are meant, (n,)."""

SCAN_THREADS = 4
"""As many requests on the way to a parallel file system as the block reader has."""
SCAN_ROWS = 16_384
"""Rows read at once, or a block: one of a few dozen costs as much as one of thousands."""
_KEY = re.compile(r"(?:([1-9][0-9]{0,3}):)?([0-9]{2})-([0-9]{10})")
_SET_KEYS = 100 * MAX_SOURCE_ROWS
"""More than the keys of one data set can be numbers."""


class RowBits:
    """One bit for each row of each shard of a split."""

    def __init__(self, packed: Iterable[NDArray[np.uint8]]) -> None:
        """`packed`: each shard's mask as `np.packbits` makes it."""
        self._packed = list(packed)

    def of(self, shard: int, begin: int, end: int) -> Mask:
        """Bits of rows begin..end of a shard: (end - begin,)."""
        low = begin // 8
        bits = np.unpackbits(self._packed[shard][low : -(-end // 8)], count=end - 8 * low)
        return bits[begin - 8 * low :].astype(bool)

    def counts(self, shard: int, rows: int, block_rows: int) -> Ints:
        """Set bits in each block of a shard of so many rows."""
        bits = np.unpackbits(self._packed[shard], count=rows)
        return np.add.reduceat(bits, np.arange(0, rows, block_rows), dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes that the bits take."""
        return sum(packed.nbytes for packed in self._packed)


class Layout:
    """How rows lie in shards and blocks of `block_rows`, numbered through the split; a shard's last may be short.

    With `selected` only those rows are there for an order: one bit a row and 8 bytes a block.
    """

    def __init__(self, shard_rows: tuple[int, ...], block_rows: int, selected: RowBits | None = None) -> None:
        self.rows = np.asarray(shard_rows, dtype=np.int64)
        self.block_rows = block_rows
        self.selected = selected
        self.first_block = np.concatenate([[0], np.cumsum(-(-self.rows // block_rows))])
        self.blocks = int(self.first_block[-1])
        self._counts: Ints | None = None
        if selected is not None:
            self._counts = np.concatenate(
                [selected.counts(shard, rows, block_rows) for shard, rows in enumerate(shard_rows)]
            )
        self.samples = int(self.rows.sum() if self._counts is None else self._counts.sum())
        """Rows that are selected."""

    def shard_of(self, block: Ints) -> tuple[Ints, Ints]:
        """Shard and number within it of blocks (n,)."""
        shard = np.searchsorted(self.first_block, block, side="right") - 1
        return shard, block - self.first_block[shard]

    def place_of(self, block: int) -> tuple[int, int]:
        """`shard_of` of one block, in less time."""
        shard = bisect.bisect_right(self.first_block, block) - 1
        return shard, block - int(self.first_block[shard])

    def length(self, block: Ints) -> Ints:
        """Selected rows of blocks (n,)."""
        if self._counts is not None:
            return self._counts[block]
        shard, within = self.shard_of(block)
        return np.minimum(self.block_rows, self.rows[shard] - within * self.block_rows)

    def chosen_of(self, shard: int, number: int) -> Ints:
        """The selected rows of block `number` of a shard, as `chosen`."""
        return self.chosen(int(self.first_block[shard]) + number)

    def chosen(self, block: int) -> Ints:
        """The selected rows of a block, (n,) ascending, counted from the block's first."""
        shard, within = self.place_of(block)
        begin = within * self.block_rows
        end = min(begin + self.block_rows, int(self.rows[shard]))
        if self.selected is None:
            return np.arange(end - begin)
        return np.flatnonzero(self.selected.of(shard, begin, end))


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What a user asks for; nothing is read yet."""

    where: str | None = None
    """Query; None: every sample."""
    exclude: Path | None = None
    """File of keys; None: leave no sample out."""
    number: int = 0
    """Which of the mixed data sets is meant."""
    sets: int = 1
    """How many there are."""

    def __bool__(self) -> bool:
        return self.where is not None or self.exclude is not None

    def keys_digest(self) -> str | None:
        """Digest of the keys left out, whatever their order, and wherever the file lies; None without a file."""
        return None if self.exclude is None else xxh3_64_hexdigest(read_keys(self.exclude).tobytes())

    def __str__(self) -> str:
        """For an error message."""
        parts = [] if self.where is None else [f"where {self.where!r}"]
        return " with ".join(parts + ([] if self.exclude is None else [f"exclude {self.exclude}"]))


def select_rows(root: Path, manifest: Manifest, split: str, selection: Selection) -> RowBits | None:
    """The rows of a split that are meant; None: all of them. InputError for a query or list that makes no sense."""
    if not selection:
        return None
    columns: set[str] = set()
    tests: list[Test] = []
    if selection.where is not None:
        query = parse_query(selection.where, manifest.labels)
        columns.update(query.columns)
        tests.append(partial(query.mask, split=split))
    if selection.exclude is not None:
        columns.update(("source", "row"))
        tests.append(_not_in(_own_keys(selection, selection.exclude, manifest)))
    # A table of no columns has no rows either; every query but one of `split` alone names a column.
    named = sorted(columns) or ["source"]

    def scan(info: ShardInfo) -> NDArray[np.uint8]:
        tables = read_tables(root, manifest, info, named)
        masks = [np.logical_and.reduce([test(table) for test in tests]) for table in tables]
        return np.packbits(np.concatenate(masks))

    return RowBits(scan_shards(manifest.splits[split], scan))


def scan_shards(shards: tuple[ShardInfo, ...], scan: Callable[[ShardInfo], Result]) -> Iterator[Result]:
    """What `scan` makes of each shard, in order, by a few threads."""
    with ThreadPoolExecutor(SCAN_THREADS, thread_name_prefix="shardclip-scan") as threads:
        yield from threads.map(scan, shards)


def read_tables(root: Path, manifest: Manifest, info: ShardInfo, columns: list[str]) -> Iterator[pa.Table]:
    """The columns of a shard, many blocks at a time; what often passes is tried again."""
    stats = ReadStats()
    with retried(lambda: ShardReader(root, manifest, info), stats) as reader:
        for block, count in reader.spans(SCAN_ROWS):
            yield retried(partial(reader.read_columns, block, columns, count), stats)


def read_keys(path: Path) -> Ints:
    """The keys in a file, one a line, as sorted numbers (set * 100 + source) * MAX_SOURCE_ROWS + row, each once."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the exclusion list {path} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"the exclusion list {path} is not text; it holds one key a line") from None
    keys = [_number(line.strip(), number, path) for number, line in enumerate(lines, 1) if line.strip()]
    return np.unique(np.array(keys, dtype=np.int64))


def _number(key: str, line: int, path: Path) -> int:
    match = _KEY.fullmatch(key)
    if match is None:
        # Not quoted: a list of paths or patients given by mistake must not end up in a log.
        raise InputError(f"line {line} of {path} is no key; a key looks like 00-0000000123, one a line")
    return (int(match[1] or 1) - 1) * _SET_KEYS + int(match[2]) * MAX_SOURCE_ROWS + int(match[3])


def _own_keys(selection: Selection, path: Path, manifest: Manifest) -> Ints:
    """The keys of the selection's data set. InputError for those that no sample can have: the list is another's."""
    keys = read_keys(path)
    if len(keys) and (most := int(keys[-1]) // _SET_KEYS) >= selection.sets:
        raise InputError(f"{path} names a sample of data set {most + 1}; there are {selection.sets}")
    keys = keys[keys // _SET_KEYS == selection.number] % _SET_KEYS
    rows = np.array([source.rows for source in manifest.sources], dtype=np.int64)
    source, row = np.divmod(keys, MAX_SOURCE_ROWS)
    known = (source < len(rows)) & (row < rows[np.minimum(source, len(rows) - 1)])
    if not known.all():
        first = int(np.argmin(known))
        raise InputError(
            f"{path} names {source[first]:02d}-{row[first]:010d}, which no source of these shards has; "
            "was it made for another data set?"
        )
    return keys


def _not_in(keys: Ints) -> Test:
    def test(table: pa.Table) -> Mask:
        own = table["source"].to_numpy().astype(np.int64) * MAX_SOURCE_ROWS + table["row"].to_numpy()
        if not len(keys):
            return np.ones(len(own), dtype=bool)
        return keys[np.minimum(np.searchsorted(keys, own), len(keys) - 1)] != own

    return test
