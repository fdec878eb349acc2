"""Train on several data sets at once, each with its share of every batch; still a pure function of the position.

    --shards A --more-shards B C --mix 0.5 0.3 0.2

The streams of the order are dealt out to the sets in proportion to the mix, spread evenly: stream c belongs to one set
for good. Item i of the k-th of a set's C' streams is position i C' + k of that set's own endless order, with its own
epochs: a small set with a large share simply comes round more often. So all that holds for one set holds here: any
position in O(log blocks), the same for any ranks (a rank has whole streams), a block live per stream. A mix is met to
half a stream in C; more streams meet it more closely.

Shards are numbered on through the sets, in the order in which they are given: (shard, row) names a sample as before,
and the order digest needs nothing new. Validation and evaluation use the first set alone.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.batch import World
from pipeline.order import Places, ShuffledOrder, Visit
from shards.counter import hash64
from shards.errors import InputError
from shards.schema import Manifest

Ints = NDArray[np.int64]

# A word of `pipeline.order`'s range, 1 to 15.
_SET_WORD = 5


def set_seed(seed: int, number: int) -> int:
    """Seed of a set's order; the first set's is the seed itself."""
    return int(hash64(seed, _SET_WORD, number)) if number else seed


def deal_streams(mix: Sequence[float], streams: int) -> Ints:
    """The set that each stream belongs to: (streams,). InputError where a set would get none."""
    shares = np.asarray(mix, dtype=np.float64) / sum(mix) * streams
    counts = np.floor(shares).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: streams - int(counts.sum())]] += 1
    if not counts.all():
        least = int(np.ceil(streams / shares.min()))
        raise InputError(
            f"mix {' '.join(f'{each:g}' for each in mix)} leaves a set none of {streams} streams; "
            f"use {least} streams or more, or another mix"
        )
    place = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(place, kind="stable")]


def check_alike(first: Manifest, other: Manifest, name: str) -> None:
    """InputError where a batch cannot hold samples of both sets."""
    for what in ("image", "tokenizer", "labels"):
        one, two = getattr(first, what), getattr(other, what)
        if one != two:
            raise InputError(f"{name} differs from --shards in its {what} ({two}, not {one}); ingest it alike")


def check_distinct(names: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """InputError where a set is named twice, if by another path or as a copy: its samples would come twice."""
    first: dict[str, str] = {}
    for name, manifest in zip(names, manifests, strict=True):
        if (same := first.get(manifest.digest)) is not None:
            raise InputError(f"{name} is the same data set as {same}; name each once, with --data.mix for its share")
        first[manifest.digest] = name


class MixedOrder:
    """The training order of one set or several. Safe to share between threads."""

    def __init__(self, orders: Sequence[ShuffledOrder], owner: Ints) -> None:
        """`owner`: (streams,) the set of each stream; each order has as many streams as are its set's."""
        self.orders = orders
        self.samples = sum(order.samples for order in orders)
        self.layouts = [order.layout for order in orders]
        self._owner, self._streams = owner, len(owner)
        self._mine = [np.flatnonzero(owner == number) for number in range(len(orders))]
        shards = [len(order.layout.rows) for order in orders]
        self.first_shard: list[int] = [0, *np.cumsum(shards).tolist()[:-1]]
        """Number of each set's first shard."""

    def locate(self, positions: Ints) -> Places:
        """Places of positions (n,) int64 >= 0, in any order; epochs are those of each sample's set."""
        item, stream = np.divmod(np.asarray(positions, dtype=np.int64), self._streams)
        places = Places(epoch=np.empty_like(item), shard=np.empty_like(item), row=np.empty_like(item))
        for number, order in enumerate(self.orders):
            here = np.flatnonzero(self._owner[stream] == number)
            index = np.searchsorted(self._mine[number], stream[here])
            found = order.locate(item[here] * order.streams + index)
            places.epoch[here], places.row[here] = found.epoch, found.row
            places.shard[here] = found.shard + self.first_shard[number]
        return places

    def visits(self, position: int, world: World) -> Iterator[Visit]:
        """The rank's visits of all sets from a position on, by the position of their first row."""
        sets = [self.set_visits(number, position, world) for number in range(len(self.orders))]
        return heapq.merge(*sets, key=lambda visit: visit.first)

    def live(self, world: World) -> list[tuple[int, int]]:
        """See `Order`."""
        streams = [np.flatnonzero(mine % world.size == world.rank) for mine in self._mine]
        return [(len(mine), order.rows_left(mine)) for mine, order in zip(streams, self.orders, strict=True)]

    def set_visits(self, number: int, position: int, world: World) -> Iterator[Visit]:
        """The rank's visits of one set; positions and shards are the mixture's."""
        order, mine = self.orders[number], self._mine[number]
        residues = np.flatnonzero(mine % world.size == world.rank)
        whole, rest = divmod(position, self._streams)
        begin = whole * order.streams + int(np.searchsorted(mine, rest))
        for visit in order.visits_of(begin, residues.tolist()):
            item, index = divmod(visit.first, order.streams)
            first, shard = item * self._streams + int(mine[index]), visit.shard + self.first_shard[number]
            yield replace(visit, first=first, step=self._streams, shard=shard)
