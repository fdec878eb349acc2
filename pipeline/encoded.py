"""One rank's batches before decoding: encoded images with everything that decides what becomes of them.

    order -> visits -> BlockReader -> EncodedBatches -> a backend decodes

A visit's rows stand `step` positions apart and a rank's batch is a range of positions `world` apart. So a visit, when
it comes, is laid out in a window over the positions to come, and a batch is cut off the window's front: work for each
visit and each batch, none for each visit in each batch.
"""

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.augment import Fate, Fates, decide
from pipeline.batch import World
from pipeline.blocks import BlockReader
from pipeline.config import LoaderConfig
from pipeline.handles import Records, key_of, record_type
from pipeline.order import Visit
from pipeline.quarantine import ShardNames
from pipeline.visits import Loaded
from shards.schema import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """n samples of one rank's batch. `images` are views that end with `EncodedBatches.release`."""

    position: int
    """First position of the global batch."""
    images: list[NDArray[np.uint8]]
    """n encoded images."""
    records: Records
    """(n,) what is known of them."""
    fate: Fate
    """Crops, flips and effects of each view."""
    finished: list[Loaded]
    """Visits that end in this batch."""

    def __len__(self) -> int:
        return len(self.images)

    def describe(self, index: int, names: ShardNames) -> str:
        """Shard and opaque key of a sample, for an error message."""
        record = self.records[index]
        return f"{names(int(record['shard']))}: image {key_of(record)} (row {record['row']})"


def rank_positions(position: int, end: int, world: World) -> NDArray[np.int64]:
    """A rank's positions in the global batch [position, end), (n,); `position` is a multiple of the world's size."""
    return np.arange(position + world.rank, end, world.size, dtype=np.int64)


class EncodedBatches:
    """Iterates over one rank's batches from a position on; in evaluation mode until every row was there."""

    def __init__(
        self,
        config: LoaderConfig,
        manifest: Manifest,
        world: World,
        reader: BlockReader,
        position: int,
        samples: int,
    ) -> None:
        """`samples` is the number of rows in the order, where an evaluation ends."""
        self._config, self._manifest, self._world, self._reader = config, manifest, world, reader
        self._position = position
        self._end = samples if config.mode == "eval" else None
        self._live: list[tuple[int, int, Loaded]] = []
        """A heap: last position, first position, visit."""
        self._window = _Window(_WINDOW, manifest)
        self._fates = Fates(config, manifest, world)

    def __iter__(self) -> "EncodedBatches":
        return self

    def __next__(self) -> Encoded:
        """The next batch; may be empty on a rank at the end of an evaluation."""
        if self._end is not None and self._position >= self._end:
            raise StopIteration
        begin, end = self._position, self._position + self._config.batch_size
        self._position = end
        positions = rank_positions(begin, min(end, self._end or end), self._world)
        self._gather(begin, end)
        images, records = self._window.take(positions // self._world.size)
        finished = []
        while self._live and self._live[0][0] < end:
            finished.append(heapq.heappop(self._live)[2])
        fate = self._fates.of(positions, records["side_words"])
        return Encoded(position=begin, images=images, records=records, fate=fate, finished=finished)

    @property
    def names(self) -> ShardNames:
        """What the shards are called."""
        return self._reader.loader.quarantine.names

    def release(self, encoded: Encoded) -> None:
        """Give back what ended with this batch. In the batches' order: earlier ones may have used the same visits."""
        self._reader.release(encoded.finished)
        encoded.finished.clear()

    def replace(self, encoded: Encoded, index: int, error: Exception) -> NDArray[np.uint8]:
        """Put the next good row of its block in the place of a sample that cannot be decoded; returns its image.

        InputError where no bad sample is tolerated. Several threads may call it, for different samples.
        """
        record = encoded.records[index]
        shard = int(record["shard"])
        self._reader.loader.retire(shard, int(record["row"]), f"cannot be decoded ({error})")
        position = encoded.position + self._world.rank + index * self._world.size
        block, within = divmod(int(record["planned"]), self._reader.loader.shards.block_rows(shard))
        visit = Visit(first=position, step=1, shard=shard, block=block, rows=np.array([within]))
        [loaded] = self._reader.load_one(visit)
        image, records = loaded.images[0].copy(), loaded.records
        self._reader.release([loaded])
        records["shard"], records["address"] = shard, image.ctypes.data
        encoded.images[index], encoded.records[index] = image, records[0]
        # its crops are its position's, as ever
        fate = decide(self._config, self._manifest, np.array([position]), records["side_words"])
        encoded.fate.flipped[index :: len(encoded)] = fate.flipped
        return image

    def _gather(self, begin: int, end: int) -> None:
        """Take the visits that start before `end` and lay them out. None of them starts before `begin`."""
        while (first := self._reader.next_first()) is not None and first < end:
            for loaded in self._reader.get():
                last = loaded.visit.last
                heapq.heappush(self._live, (last, loaded.visit.first, loaded))  # no two have the same positions
                if (last - begin) // self._world.size >= len(self._window):
                    self._widen(last - begin)
                else:
                    self._lay_out(loaded)

    def _widen(self, span: int) -> None:
        """A window for so many positions at least, with all that is under way in it."""
        count = len(self._window)
        while count <= span // self._world.size:
            count *= 2
        self._window = _Window(count, self._manifest)
        for _, _, loaded in self._live:
            self._lay_out(loaded)

    def _lay_out(self, loaded: Loaded) -> None:
        visit = loaded.visit
        positions = visit.first + visit.step * np.arange(len(visit.rows), dtype=np.int64)
        self._window.put(loaded, positions // self._world.size)


_WINDOW = 1024
"""Samples of this rank that the window has room for at first."""


class _Window:
    """This rank's samples to come, counted from position 0; number n stands at n modulo their count."""

    def __init__(self, count: int, manifest: Manifest) -> None:
        self.images: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * count
        self.records = np.zeros(count, dtype=record_type(manifest))

    def __len__(self) -> int:
        return len(self.images)

    def put(self, loaded: Loaded, numbers: NDArray[np.int64]) -> None:
        """Lay out the samples of a visit, which have these numbers."""
        into = numbers % len(self)
        for place, image in zip(into.tolist(), loaded.images, strict=True):
            self.images[place] = image
        loaded.records["shard"] = loaded.visit.shard
        self.records[into] = loaded.records

    def take(self, numbers: NDArray[np.int64]) -> tuple[list[NDArray[np.uint8]], Records]:
        """Images and a copy of the records of the samples with these numbers."""
        places = numbers % len(self)
        return [self.images[place] for place in places.tolist()], self.records.take(places)
