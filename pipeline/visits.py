"""Load one visit: rows of its block, image bytes into a buffer, every xxh3 checked, bad samples replaced.

What a copy on the node gets wrong is read again from the shared folder before anything is said of a sample: which ones
are bad must not depend on the node.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.handles import OpenShards
from pipeline.order import Visit
from pipeline.quarantine import BadSample, Quarantine
from pipeline.read import OpenShard
from shards.errors import InputError
from shards.reader import Rows
from shards.schema import Manifest

Ints = NDArray[np.int64]
Result = TypeVar("Result")


class Pool(Protocol):
    """Where buffers come from and go back to; safe to share between threads."""

    def take(self, size: int) -> NDArray[np.uint8]:
        """A buffer of at least `size` bytes."""
        ...

    def give(self, buffer: NDArray[np.uint8]) -> None:
        """Take a buffer back."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A visit with its data, all in its order of use. The images are views of a buffer: release it after use."""

    visit: Visit
    images: list[NDArray[np.uint8]]
    """n encoded images."""
    rows: Rows
    """Their rows."""
    shard_rows: Ints
    """(n,) their rows in the shard."""
    planned: Ints
    """(n,) the rows in the shard that the order names; another stands in `shard_rows` where that one is bad."""
    buffer: NDArray[np.uint8]


class VisitLoader:
    """Loads visits of one split. Safe to share between threads."""

    def __init__(
        self, shards: OpenShards, manifest: Manifest, quarantine: Quarantine, candidates: Callable[[int, int], Ints]
    ) -> None:
        """`candidates(shard, block)`: the rows of a block, from its first, that may stand in for a bad one."""
        self.shards, self.quarantine = shards, quarantine
        self._block_rows, self._candidates = manifest.block_rows, candidates

    def load(self, visit: Visit, pool: Pool) -> Loaded:
        """A visit's data. InputError for what cannot be read, and for bad samples where none are tolerated."""
        return self._at(visit.shard, lambda shard: self._load(visit, shard, pool))

    def retire(self, number: int, row: int, why: str) -> None:
        """Note that a row of a shard is bad although its bytes are sound. InputError where none is tolerated."""
        block, within = divmod(row, self._block_rows)
        rows = self._at(number, lambda shard: self.shards.rows(shard, number, block))
        self._condemn(number, pick_rows(rows, np.array([within])), np.array([row]), [0], why)

    def _at(self, number: int, action: Callable[[OpenShard], Result]) -> Result:
        """What `action` returns of a shard's copy on the node; of the shared folder's, where there is no sound one."""
        if self.shards.has_copy(number):
            try:
                with self.shards.use(number, staged=True) as shard:
                    return action(shard)
            except InputError as error:
                self.shards.distrust(number, error)
        with self.shards.use(number) as shard:
            return action(shard)

    def _load(self, visit: Visit, shard: OpenShard, pool: Pool) -> Loaded:
        block, first = self.shards.rows(shard, visit.shard, visit.block), visit.block * self._block_rows
        while True:
            places = self.quarantine.replace(
                visit.shard, first, visit.rows, lambda: self._candidates(visit.shard, visit.block)
            )
            rows = pick_rows(block, places)
            buffer, images = read_images(shard, rows, pool)
            damaged = [row for row, image in enumerate(images) if not is_sound(shard, image, rows, row)]
            if not damaged:
                break
            pool.give(buffer)
            if shard.staged:  # of no weight: the shared folder is asked next
                raise InputError("an image of it is damaged")
            self._condemn(visit.shard, rows, first + places, damaged, "is damaged: its xxh3 differs")
        self.shards.stats.add(blocks=1)
        return Loaded(
            visit=visit, images=images, rows=rows, shard_rows=first + places, planned=first + visit.rows, buffer=buffer
        )

    def _condemn(self, number: int, rows: Rows, shard_rows: Ints, wrong: list[int], why: str) -> None:
        """Note samples as bad, the one of the lowest row first, which is the one that an error names."""
        keys = rows.keys()
        for index in sorted(wrong, key=lambda index: int(shard_rows[index])):
            row, offset = int(shard_rows[index]), int(rows.offset[index])
            self.quarantine.condemn(BadSample(shard=number, row=row, key=keys[index], offset=offset, why=why))


def read_images(shard: OpenShard, rows: Rows, pool: Pool) -> tuple[NDArray[np.uint8], list[NDArray[np.uint8]]]:
    """A buffer from the pool and the images of rows as views of it, read in one go."""
    begin, end = int(rows.offset.min()), int((rows.offset + rows.size).max())
    buffer = pool.take(end - begin)
    try:
        shard.read_into(buffer[: end - begin], begin)
    except BaseException:
        pool.give(buffer)
        raise
    starts = (rows.offset - begin).tolist()
    return buffer, [buffer[at : at + size] for at, size in zip(starts, rows.size.tolist(), strict=True)]


def is_sound(shard: OpenShard, image: NDArray[np.uint8], rows: Rows, row: int) -> bool:
    """Whether an image is what ingest wrote; one that is not gets a second reading, past the page cache."""
    if shard.is_sound(image, rows, row):
        return True
    shard.reread(image, int(rows.offset[row]))
    return shard.is_sound(image, rows, row)


def pick_rows(rows: Rows, chosen: Ints) -> Rows:
    """The chosen rows, in the order of `chosen`."""
    fields = {name: getattr(rows, name)[chosen] for name in Rows.__slots__}
    return replace(rows, **fields)
