"""Load one visit: rows of its block, image bytes into a buffer, every xxh3 checked, bad samples replaced.

What a copy on the node gets wrong is read again from the shared folder before anything is said of a sample: which ones
are bad must not depend on the node.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from pipeline.handles import OpenShards, Records, key_of
from pipeline.order import Visit
from pipeline.quarantine import BadSample, Quarantine
from pipeline.read import OpenShard
from shards.errors import InputError

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
    records: Records
    """(n,) what is known of them."""
    buffer: NDArray[np.uint8]


class VisitLoader:
    """Loads visits. Safe to share between threads."""

    def __init__(self, shards: OpenShards, quarantine: Quarantine) -> None:
        self.shards, self.quarantine = shards, quarantine

    def load(self, visit: Visit, pool: Pool) -> Loaded:
        """A visit's data. InputError for what cannot be read, and for bad samples where none are tolerated."""
        return self._at(visit.shard, lambda shard: self._load(visit, shard, pool))

    def retire(self, number: int, row: int, why: str) -> None:
        """Note that a row of a shard is bad although its bytes are sound. InputError where none is tolerated."""
        block, within = divmod(row, self.shards.block_rows(number))
        records = self._at(number, lambda shard: self.shards.records(shard, number, block))
        self._condemn(number, records[[within]], [0], why)

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
        block = self.shards.records(shard, visit.shard, visit.block)
        first = visit.block * self.shards.block_rows(visit.shard)
        while True:
            places = self.quarantine.replace(
                visit.shard, first, visit.rows, lambda: self.shards.candidates(visit.shard, visit.block)
            )
            records = block.take(places)  # with [] numpy looks at each field: five times the work
            records["planned"] = visit.rows + first
            buffer, images = read_images(shard, records, pool)
            try:
                damaged = find_damaged(shard, images, records)
            except BaseException:  # its second reading failed; the shared folder may stand in for it
                pool.give(buffer)
                raise
            if not damaged:
                break
            pool.give(buffer)
            if shard.staged:  # of no weight: the shared folder is asked next
                raise InputError("an image of it is damaged")
            self._condemn(visit.shard, records, damaged, "is damaged: its xxh3 differs")
        self.shards.stats.add(blocks=1)
        return Loaded(visit=visit, images=images, records=records, buffer=buffer)

    def _condemn(self, number: int, records: Records, wrong: list[int], why: str) -> None:
        """Note samples as bad, the one of the lowest row first, which is the one that an error names."""
        for record in sorted(records[wrong], key=lambda record: int(record["row"])):
            row, offset = int(record["row"]), int(record["offset"])
            self.quarantine.condemn(BadSample(shard=number, row=row, key=key_of(record), offset=offset, why=why))


def read_images(shard: OpenShard, records: Records, pool: Pool) -> tuple[NDArray[np.uint8], list[NDArray[np.uint8]]]:
    """A buffer from the pool and the images of records as views of it, read in one go; they get their addresses."""
    starts, sizes = records["offset"].tolist(), records["size"].tolist()
    begin, end = min(starts), max(map(int.__add__, starts, sizes))
    places = [start - begin for start in starts]
    gaps: list[tuple[int, int]] = []
    if end - begin - sum(sizes) > UNWANTED_BYTES:
        places, gaps = _close_up(places, sizes)
    size = end - begin - sum(gap for _, gap in gaps)
    buffer = pool.take(size)
    try:
        shard.read_into(buffer[:size], begin, gaps)
    except BaseException:
        pool.give(buffer)
        raise
    records["address"] = buffer.ctypes.data + np.array(places)
    return buffer, [buffer[at : at + size] for at, size in zip(places, sizes, strict=True)]


UNWANTED_BYTES = 64 << 10
"""Bytes between two images from which on they take no memory: films of a visit lie scattered where it is a part of a
block, and bare pixels of those between would be most of what it holds."""


def _close_up(places: list[int], sizes: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """The places of images (n,) when what lies between them is left out where that is much, and these gaps: behind
    which place, so counted, how many bytes."""
    gaps, moved, end, closed = [], 0, 0, dict[int, int]()
    for place, size in sorted(zip(places, sizes, strict=True)):
        if place - end > UNWANTED_BYTES:
            gaps.append((end - moved, place - end))
            moved += place - end
        closed[place] = place - moved
        end = max(end, place + size)
    return [closed[place] for place in places], gaps


def find_damaged(shard: OpenShard, images: list[NDArray[np.uint8]], records: Records) -> list[int]:
    """Which images are not what ingest wrote; each such one gets a second reading, past the page cache, first."""
    expected = records["xxh3"].tolist()
    found = [xxh3_64_intdigest(image.data) for image in images]
    wrong = [] if found == expected else [index for index, each in enumerate(expected) if found[index] != each]
    for index in wrong:
        shard.reread(images[index], int(records["offset"][index]))
    return [index for index in wrong if xxh3_64_intdigest(images[index].data) != expected[index]]
