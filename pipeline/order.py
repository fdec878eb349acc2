"""Order as a pure function: position -> (epoch, shard, row), for positions 0, 1, 2, ... without end.

The construction of DESIGN.md. An epoch's blocks are permuted by seed and laid end to end; that list of N rows is cut
into C nearly equal spans, the streams (the first N mod C are one row longer). Position p of an epoch is item p div C of
stream p mod C. The rows of a block are permuted by (seed, epoch, block) before the cut. So every epoch is exactly a
permutation of the split, any position is found in O(log blocks) with O(blocks) memory, and at any time one block a
stream is live: B blocks cost at most B + C - 1 block reads an epoch, for any number of ranks, because rank r of R takes
the positions p = r mod R and R divides C, which gives it whole streams.

Where only some rows are selected (`selection`), N, B and the permutations are those of the selected rows and of the
blocks that hold one; nothing else changes, and selecting all rows changes nothing.

How random that is stands in bench/results/cpu-2core-scale.json: 0.8 % of the pairs in a batch of 64 share a block, and
films that met in a batch meet again in the next epoch's by chance. Neighbours of a stream, C positions apart, do share
one, which tells nothing of them, as ingest writes shards in random order.

A *visit* is one stay of one stream in one block: what the reader reads, and in which order its rows are used.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.batch import World
from pipeline.selection import Layout
from shards.counter import permutation

Ints = NDArray[np.int64]

# First words after the seed: they keep the random numbers of different uses apart (pipeline.augment has 16 and up).
_BLOCK_WORD, _ROW_WORD = 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where n positions lie. All int64 (n,)."""

    epoch: Ints
    """Epoch, from 0."""
    shard: Ints
    """Number of the shard in its split."""
    row: Ints
    """Row in the shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """The rows that one rank takes from one block in one go, in order of use."""

    first: int
    """Position of the first of them."""
    step: int
    """Positions from one to the next."""
    shard: int
    """Number of the shard in its split."""
    block: int
    """Number of the block in the shard."""
    rows: Ints
    """(n,) rows within the block, n >= 1."""

    @property
    def last(self) -> int:
        """Position of the last row."""
        return self.first + (len(self.rows) - 1) * self.step

    def part(self, first: int, end: int) -> "Visit":
        """Its rows number first .. end - 1."""
        rows, begin = self.rows[first:end], self.first + first * self.step
        return Visit(first=begin, step=self.step, shard=self.shard, block=self.block, rows=rows)


class Order(Protocol):
    """What the loader needs to know of an order."""

    samples: int
    """Of an epoch; in a mixture, of all sets."""
    layouts: list[Layout]
    """Of each set that it reads."""

    def live(self, world: World) -> list[tuple[int, int]]:
        """How many visits of each set a rank has open at once, and how many rows of theirs are left, at the most."""
        ...

    def locate(self, positions: Ints) -> Places:
        """Places of positions (n,) int64 >= 0."""
        ...

    def visits(self, position: int, world: World) -> Iterator[Visit]:
        """The rank's visits from a position on, by the position of their first row."""
        ...


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The blocks of one epoch laid end to end: 12 bytes a block."""

    block: NDArray[np.int32]
    """(blocks,) in order."""
    start: Ints
    """(blocks + 1,) rows before each."""

    def find(self, row: int | Ints) -> Ints:
        """Index in the list of the block that holds each row of the epoch."""
        return np.searchsorted(self.start, row, side="right") - 1


class ShuffledOrder:
    """The training order of one split. Safe to share between threads."""

    def __init__(self, layout: Layout, *, seed: int, streams: int) -> None:
        self.layout = layout
        self.samples = layout.samples
        self.seed = seed
        self.streams = streams
        self._epochs: dict[int, _Epoch] = {}

    def locate(self, positions: Ints) -> Places:
        """Places of positions (n,) int64 >= 0, in any order."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, within = np.divmod(positions, self.samples)
        item, stream = np.divmod(within, self.streams)
        places = Places(epoch=epochs, shard=np.empty_like(positions), row=np.empty_like(positions))
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            self._locate_rows(int(epoch), self._span_start(stream[here]) + item[here], here, places)
        return places

    def visits(self, position: int, world: World) -> Iterator[Visit]:
        """The rank's visits from a position on, endless, by the position of their first row."""
        return self.visits_of(position, range(world.rank, self.streams, world.size))

    def visits_of(self, position: int, residues: Sequence[int]) -> Iterator[Visit]:
        """The visits from a position on whose positions leave one of these remainders modulo the streams."""
        epoch = position // self.samples
        while residues:
            start = epoch * self.samples
            streams = sorted((residue - start) % self.streams for residue in residues)
            mine = [stream for stream in streams if stream < self.samples]
            spans = [self._stream_visits(epoch, stream, max(position - start, 0)) for stream in mine]
            yield from heapq.merge(*spans, key=lambda visit: visit.first)
            epoch += 1

    def rows_left(self, streams: Ints) -> int:
        """How many rows are left of the visits that these streams are in, at the most: about half of them, or all where
        the streams begin their blocks together. As it is in the first epoch while a stream goes through two blocks."""
        table, end = self._epoch(0), self._span_start(streams + 1)

        def left(item: int) -> int:
            row = self._span_start(streams) + item
            block = np.minimum(table.find(row) + 1, len(table.start) - 1)
            return int(np.maximum(np.minimum(table.start[block], end) - row, 0).sum())

        return max(map(left, range(0, 2 * self.layout.block_rows, max(1, self.layout.block_rows // 32))))

    def _span_start(self, stream: int | Ints) -> Ints:
        short, longer = divmod(self.samples, self.streams)
        return stream * short + np.minimum(stream, longer)

    def _locate_rows(self, epoch: int, rows: Ints, here: Ints, places: Places) -> None:
        """Fill in the places of rows of the epoch's list."""
        table = self._epoch(epoch)
        index = table.find(rows)
        block = table.block[index].astype(np.int64)
        places.shard[here], within = self.layout.shard_of(block)
        for one in np.unique(block):
            mine = np.flatnonzero(block == one)
            order = self._rows(epoch, int(one))
            places.row[here[mine]] = within[mine] * self.layout.block_rows + order[(rows - table.start[index])[mine]]

    def _stream_visits(self, epoch: int, stream: int, within: int) -> Iterator[Visit]:
        """Visits of one stream from the first of its items at or after a position within the epoch."""
        table = self._epoch(epoch)
        start, end = int(self._span_start(stream)), int(self._span_start(stream + 1))
        item = max(0, -(-(within - stream) // self.streams))
        index = int(table.find(start + item))
        while start + item < end:
            block, begin = int(table.block[index]), int(table.start[index])
            stop = min(int(table.start[index + 1]), end)
            shard, number = self.layout.place_of(block)
            yield Visit(
                first=epoch * self.samples + item * self.streams + stream,
                step=self.streams,
                shard=shard,
                block=number,
                rows=self._rows(epoch, block)[start + item - begin : stop - begin],
            )
            item, index = stop - start, index + 1

    def _lengths(self, epoch: int, block: Ints) -> Ints:  # noqa: ARG002  # `balance` draws anew each epoch
        """How many rows of blocks (n,) the epoch uses."""
        return self.layout.length(block)

    def _rows(self, epoch: int, block: int) -> Ints:
        """Rows of a block in the order of their use."""
        chosen = self.layout.chosen(block)
        order = permutation(len(chosen), self.seed, _ROW_WORD, epoch, block)
        return order if self.layout.selected is None else chosen[order]

    def _epoch(self, epoch: int) -> _Epoch:
        """The epoch's table; this epoch's and the one before are kept, because batches and read-ahead span two."""
        table = self._epochs.get(epoch)
        if table is None:
            block = permutation(self.layout.blocks, self.seed, _BLOCK_WORD, epoch)
            length = self._lengths(epoch, block)
            block, length = block[length > 0], length[length > 0]
            start = np.concatenate([[0], np.cumsum(length)])
            table = _Epoch(block.astype(np.int32), start)
            self._epochs = dict([*sorted(self._epochs.items())[-1:], (epoch, table)])
        return table


class RowOrder:
    """The evaluation order: shard by shard, row by row, once; rank r of R takes the positions r mod R."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.layouts = layout, [layout]
        self.samples = layout.samples
        self._start = np.concatenate([[0], np.cumsum(layout.length(np.arange(layout.blocks)))])
        """(blocks + 1,) positions before each."""

    def live(self, world: World) -> list[tuple[int, int]]:
        """See `Order`. One after the other, on any rank."""
        return [(1, -(-self.layout.block_rows // world.size))]

    def locate(self, positions: Ints) -> Places:
        """Places of positions (n,) int64 in [0, samples)."""
        positions = np.asarray(positions, dtype=np.int64)
        block = self._find(positions)
        shard, within = self.layout.shard_of(block)
        row = within * self.layout.block_rows
        for one in np.unique(block):
            mine = np.flatnonzero(block == one)
            row[mine] += self.layout.chosen(int(one))[positions[mine] - self._start[one]]
        return Places(epoch=np.zeros_like(positions), shard=shard, row=row)

    def visits(self, position: int, world: World) -> Iterator[Visit]:
        """The rank's visits from a position on, one a block that holds rows of its, until the last row."""
        for block in range(int(self._find(np.array(position))), self.layout.blocks):
            begin, end = int(self._start[block]), int(self._start[block + 1])
            first = max(begin, position)
            first += (world.rank - first) % world.size
            if first < end:
                shard, number = self.layout.place_of(block)
                rows = self.layout.chosen(block)[first - begin :: world.size]
                yield Visit(first=first, step=world.size, shard=shard, block=number, rows=rows)

    def _find(self, positions: Ints) -> Ints:
        """The blocks that hold positions; behind the last position, the number of blocks."""
        return np.searchsorted(self._start, positions, side="right") - 1
