"""Use rows more or less often by their class, without writing shards anew and without losing the order's properties.

    --balance Cardiomegaly           each value of the label, blank too, gets the same share of an epoch
    --balance "Edema == 1"           samples for which a query holds get one half, the others the other

An epoch has N positions as before, N being the selected rows. It is drawn by systematic sampling (Madow, "On the theory
of systematic sampling", 1949): the rows lie end to end, each as wide as its weight; N marks at equal distances, offset
by a random number of the epoch, are laid on them; a row is used as often as marks fall on it. So a row of weight w (N
over the number of classes and the rows of its class) is used floor(w) or ceil(w) times in every epoch and w times on
average, and the sum of an epoch is N with nothing left to chance.

Rows lie in the order of their blocks, and within a block in the epoch's own random order. So a block's draws depend on
the weight before it and its own alone: O(blocks) memory beside the classes' bits, any position in O(log blocks), a
block read once for all of its draws, the same for any ranks. The price: the repeats of a row stand in one visit of its
block, C positions apart or more, so batches larger than the streams may hold a row of a rare class twice.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.order import ShuffledOrder
from pipeline.selection import Layout, RowBits, read_tables, scan_shards
from shards.counter import hash64, permutation
from shards.errors import InputError
from shards.query import parse_query
from shards.schema import LABEL_PREFIX, Manifest, ShardInfo

Ints = NDArray[np.int64]
Values = NDArray[np.float32]

MAX_CLASSES = 256
UNIT = 1 << 28
"""Width of a row of mean weight: 10**10 rows of it still fit 63 bits, and a weight is exact to 1 in 10**8."""

# Words of `pipeline.order`'s range, 1 to 15.
_OFFSET_WORD, _REPEAT_WORD = 3, 4


class Classes:
    """The class of each row of a split: log2 of the number of classes, rounded up, in bits a row."""

    def __init__(self, shards: list[tuple[Values, list[NDArray[np.uint8]]]]) -> None:
        """For each shard the values that occur in it, and the number of each row's among them as packed bit planes."""
        self.values = np.unique(np.concatenate([values for values, _ in shards]))
        """(classes,) ascending, NaN for blank last."""
        self._numbers = [np.searchsorted(self.values, values) for values, _ in shards]
        depth = max(len(planes) for _, planes in shards)
        self._planes = [
            RowBits(planes[bit] if bit < len(planes) else np.zeros_like(planes[0]) for _, planes in shards)
            for bit in range(depth)
        ]

    def of(self, shard: int, begin: int, end: int) -> Ints:
        """Numbers of the classes of rows begin..end of a shard: (end - begin,)."""
        local = sum(plane.of(shard, begin, end).astype(np.int64) << bit for bit, plane in enumerate(self._planes))
        return self._numbers[shard][local]


def read_classes(root: Path, manifest: Manifest, split: str, balance: str) -> Classes:
    """The classes of a split by a label's name or a query. InputError where it is neither, or has too many values."""
    columns, value = _value(manifest, split, balance)

    def scan(info: ShardInfo) -> tuple[Values, list[NDArray[np.uint8]]]:
        found = np.concatenate([value(table) for table in read_tables(root, manifest, info, columns)])
        values, local = np.unique(found, return_inverse=True)
        if len(values) > MAX_CLASSES:
            raise InputError(
                f"balance {balance!r}: it has more than {MAX_CLASSES} different values; "
                'balance by a query, such as "Age < 40"'
            )
        return values, [np.packbits(local >> bit & 1) for bit in range(max(1, (len(values) - 1).bit_length()))]

    return Classes(list(scan_shards(manifest.splits[split], scan)))


def _value(manifest: Manifest, split: str, balance: str) -> tuple[list[str], Callable[[pa.Table], Values]]:
    """Columns to read, and what makes a class number of them."""
    if balance in manifest.labels:
        column = LABEL_PREFIX + balance
        return [column], lambda table: table[column].to_numpy().astype(np.float32)
    query = parse_query(balance, manifest.labels, setting="balance")
    return list(query.columns) or ["source"], lambda table: query.mask(table, split).astype(np.float32)


class BalancedOrder(ShuffledOrder):
    """The training order with as many draws for each class. InputError where there is but one."""

    def __init__(self, layout: Layout, classes: Classes, *, seed: int, streams: int) -> None:
        super().__init__(layout, seed=seed, streams=streams)
        self._classes = classes
        counts = np.zeros(len(classes.values), dtype=np.int64)
        for numbers, mask in self._shards():
            counts += np.bincount(numbers[mask], minlength=len(counts))
        present = counts > 0
        if present.sum() < 2:
            raise InputError("nothing to balance: all samples in use are of one class; balance by something else")
        self.weights = np.where(present, layout.samples / (present.sum() * np.maximum(counts, 1)), 0.0)
        """(classes,) how often a row of each is used in an epoch, on average."""
        self._widths = np.maximum(np.rint(self.weights * UNIT), 1).astype(np.int64)
        starts = [np.arange(0, rows, layout.block_rows) for rows in layout.rows.tolist()]
        sums = [
            np.add.reduceat(self._widths[numbers] * mask, start)
            for (numbers, mask), start in zip(self._shards(), starts, strict=True)
        ]
        self._before = np.concatenate([[0], np.cumsum(np.concatenate(sums))])
        """(blocks + 1,) widths of all rows before each block, in the order of storage."""
        self._distance = int(self._before[-1]) // self.samples

    def _lengths(self, epoch: int, block: Ints) -> Ints:
        return self._marks(epoch, self._before[block + 1]) - self._marks(epoch, self._before[block])

    def _rows(self, epoch: int, block: int) -> Ints:
        chosen = super()._rows(epoch, block)
        shard, number = self.layout.place_of(block)
        begin = number * self.layout.block_rows
        end = min(begin + self.layout.block_rows, int(self.layout.rows[shard]))
        width = self._widths[self._classes.of(shard, begin, end)[chosen]]
        edges = self._before[block] + np.concatenate([[0], np.cumsum(width)])
        drawn = np.repeat(chosen, np.diff(self._marks(epoch, edges)))
        return drawn[permutation(len(drawn), self.seed, _REPEAT_WORD, epoch, block)]

    def _marks(self, epoch: int, width: Ints) -> Ints:
        """How many of the epoch's marks lie before each of these widths."""
        offset = int(hash64(self.seed, _OFFSET_WORD, epoch)) % self._distance
        return np.clip(-(-(width - offset) // self._distance), 0, self.samples)

    def _shards(self) -> Iterator[tuple[Ints, NDArray[np.bool_]]]:
        """Of each shard its rows' classes and whether they are selected, each (rows,)."""
        for shard, rows in enumerate(self.layout.rows.tolist()):
            selected = self.layout.selected
            mask = np.ones(rows, dtype=bool) if selected is None else selected.of(shard, 0, rows)
            yield self._classes.of(shard, 0, rows), mask
