"""Load one visit: rows of its block, image bytes into a buffer, every xxh3 checked, bad samples replaced.

What a copy on the node gets wrong is read again from the shared folder before anything is said of a sample: which ones
are bad must not depend on the node.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from pipeline.buffers import PART_BYTES
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
    """A visit, or a part of one, with its data, all in its order of use. The images are views of a buffer: release it
    after use."""

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

    def load(self, visit: Visit, pool: Pool) -> list[Loaded]:
        """A visit's data, in parts that have a buffer each. InputError for what cannot be read, and for bad samples
        where none are tolerated."""
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

    def _load(self, visit: Visit, shard: OpenShard, pool: Pool) -> list[Loaded]:
        block = self.shards.records(shard, visit.shard, visit.block)
        first = visit.block * self.shards.block_rows(visit.shard)
        while True:
            places = self.quarantine.replace(
                visit.shard, first, visit.rows, lambda: self.shards.candidates(visit.shard, visit.block)
            )
            records = block.take(places)  # with [] numpy looks at each field: five times the work
            records["planned"] = visit.rows + first
            buffers, images = read_images(shard, records, pool)
            try:
                damaged = find_damaged(shard, images, records)
            except BaseException:  # its second reading failed; the shared folder may stand in for it
                give_all(buffers, pool)
                raise
            if not damaged:
                break
            give_all(buffers, pool)
            if shard.staged:  # of no weight: the shared folder is asked next
                raise InputError("an image of it is damaged")
            self._condemn(visit.shard, records, damaged, "is damaged: its xxh3 differs")
        self.shards.stats.add(blocks=1)
        if len(buffers) == 1:
            return [Loaded(visit=visit, images=images, records=records, buffer=buffers[0])]
        return [
            Loaded(visit=visit.part(*span), images=images[slice(*span)], records=records[slice(*span)], buffer=buffer)
            for span, buffer in zip(spans(len(images), len(buffers)), buffers, strict=True)
        ]

    def _condemn(self, number: int, records: Records, wrong: list[int], why: str) -> None:
        """Note samples as bad, the one of the lowest row first, which is the one that an error names."""
        for record in sorted(records[wrong], key=lambda record: int(record["row"])):
            row, offset = int(record["row"]), int(record["offset"])
            self.quarantine.condemn(BadSample(shard=number, row=row, key=key_of(record), offset=offset, why=why))


UNWANTED_BYTES = 64 << 10
"""Between the images of a small visit, up to which they are read as they lie, which is the least work."""


def spans(count: int, parts: int) -> list[tuple[int, int]]:
    """So many things in parts that are equal, or nearly: the first of each, and the first behind it."""
    return [(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


Read = tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]
"""Buffers from the pool, one for each of the `spans` of some records, and the images as views of them."""


def read_images(shard: OpenShard, records: Records, pool: Pool) -> Read:
    """The images of records, read in one go; the records get their addresses."""
    starts, sizes = records["offset"].tolist(), records["size"].tolist()
    begin, end = min(starts), max(map(int.__add__, starts, sizes))
    if end - begin > min(PART_BYTES, sum(sizes) + UNWANTED_BYTES):
        return _read_parts(shard, records, pool, starts, sizes)
    buffer = pool.take(end - begin)
    try:
        shard.read_into([(begin, buffer[: end - begin])])
    except BaseException:
        pool.give(buffer)
        raise
    records["address"] = buffer.ctypes.data + (records["offset"] - begin)
    return [buffer], [buffer[start - begin : start - begin + size] for start, size in zip(starts, sizes, strict=True)]


def _read_parts(shard: OpenShard, records: Records, pool: Pool, starts: list[int], sizes: list[int]) -> Read:
    """As `read_images`, without what lies between, in several buffers in their order of use, so that the first can be
    given back before the last. An image that is used more than once lies where it is used last.
    """
    last_use = dict(zip(starts, range(len(starts)), strict=True))
    use = [last_use[start] for start in starts]
    if repeated := len(last_use) < len(starts):
        records["size"] = [sizes[number] for number in use]
        sizes = [size if use[number] == number else 0 for number, size in enumerate(sizes)]
    buffers, images, addresses = list[NDArray[np.uint8]](), list[NDArray[np.uint8]](), list[int]()
    try:
        for first, end in spans(len(sizes), min(len(sizes), max(1, round(sum(sizes) / PART_BYTES)))):
            edges = list(itertools.accumulate(sizes[first:end], initial=0))
            buffers.append(buffer := pool.take(max(1, edges[-1])))
            images += [buffer[begin:stop] for begin, stop in itertools.pairwise(edges)]
            address = buffer.ctypes.data
            addresses += [address + begin for begin in edges[:-1]]
        shard.read_into([(start, images[number]) for start, number in sorted(last_use.items())])
    except BaseException:
        give_all(buffers, pool)
        raise
    if repeated:
        images, addresses = [images[number] for number in use], [addresses[number] for number in use]
    records["address"] = addresses
    return buffers, images


def give_all(buffers: Sequence[NDArray[np.uint8]], pool: Pool) -> None:
    """Give buffers back."""
    for buffer in buffers:
        pool.give(buffer)


def find_damaged(shard: OpenShard, images: list[NDArray[np.uint8]], records: Records) -> list[int]:
    """Which images are not what ingest wrote; each such one gets a second reading, past the page cache, first."""
    expected = records["xxh3"].tolist()
    found = [xxh3_64_intdigest(image.data) for image in images]
    wrong = [] if found == expected else [index for index, each in enumerate(expected) if found[index] != each]
    for index in wrong:
        shard.reread(images[index], int(records["offset"][index]))
    return [index for index in wrong if xxh3_64_intdigest(images[index].data) != expected[index]]
