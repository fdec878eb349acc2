"""Samples that cannot be trained on, and what takes their place: a pure function of the shard's bytes.

A sample is bad where its image is not what ingest wrote (its xxh3 differs, twice) or is, and cannot be decoded.
Without a tolerance that ends the run. With `max_bad`, the place of a bad row is taken by the next good row of its
block, in row order and from the end on from the start, of those selected: the same row in every epoch, on any number of
ranks, with any threads and after any resume, because nothing but the block decides. Bad rows are known before they are
delivered (blocks are read ahead) but count, and are told of, when a batch would have held them: so a run stops at the
same batch however far it had read.
"""

import bisect
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError
from shards.schema import shard_name

log = logging.getLogger("shardclip")
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class BadSample:
    """One sample that cannot be trained on."""

    shard: int
    """Number of the shard in its split, or in the mixture."""
    row: int
    """Row in the shard."""
    key: str
    """Opaque key."""
    offset: int
    """First byte of the image in the tar."""
    why: str
    """What is wrong with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardNames:
    """What shards are called by people; in a mixture they are numbered on through the data sets."""

    split: str
    first: tuple[int, ...] = (0,)
    """Number of each set's first shard."""

    def __call__(self, shard: int) -> str:
        number = bisect.bisect(self.first, shard) - 1
        name = f"shard {shard_name(self.split, shard - self.first[number])}"
        return name if len(self.first) == 1 else f"{name} of data set {number + 1}"


def check_count(split: str, count: int, limit: int) -> None:
    """InputError where so many bad samples are more than tolerated."""
    if count > limit:
        raise InputError(
            f"{count} bad samples in split {split}, {limit} are tolerated (max_bad); find all damage with "
            "python -m shards verify, then restore the shards or ingest again"
        )


class Quarantine:
    """The bad samples that one rank knows of. Safe to share between threads."""

    def __init__(self, names: ShardNames, limit: int, known: Iterable[dict[str, Any]] = ()) -> None:
        """`known`: what an earlier run `listed`, on all its ranks."""
        self.names, self.limit = names, limit
        told = [BadSample(**fields) for fields in known]
        self._bad = {(bad.shard, bad.row): bad for bad in told}
        self._counted = set(self._bad)
        self._lock = threading.Lock()

    def condemn(self, bad: BadSample) -> None:
        """Note a bad sample. InputError where none is tolerated."""
        if not self.limit:
            raise InputError(
                f"{self._describe(bad)}; restore the shard (python -m shards verify finds all damage) or ingest "
                "again, or train without such images (max_bad)"
            )
        with self._lock:
            self._bad.setdefault((bad.shard, bad.row), bad)

    def is_bad(self, shard: int, row: int) -> bool:
        """Whether a row of a shard is known to be bad."""
        return (shard, row) in self._bad

    def replace(self, shard: int, first: int, rows: Ints, candidates: Callable[[], Ints]) -> Ints:
        """Rows (n,) of the block that begins at row `first`, the bad ones replaced by the next good candidate.

        All are counted from the block's first row. InputError where the block has no good row.
        """
        if not any(each == shard for each, _ in tuple(self._bad)):
            return rows
        wrong = [index for index, row in enumerate(rows.tolist()) if self.is_bad(shard, first + row)]
        if not wrong:
            return rows
        good = [row for row in candidates().tolist() if not self.is_bad(shard, first + row)]
        if not good:
            name = self.names(shard)
            raise InputError(f"{name}: no image of the block at row {first} is good; restore it or ingest again")
        replaced, sorted_good = rows.copy(), np.array(good)
        replaced[wrong] = sorted_good[np.searchsorted(sorted_good, rows[wrong]) % len(good)]
        return replaced

    def count(self, replaced: Ints) -> None:
        """Count the places (m, 2) shard, row that others took in a delivered batch. InputError beyond the limit."""
        for shard, row in replaced.tolist():
            if (shard, row) not in self._counted:
                self._counted.add((shard, row))
                told = self._describe(self._bad[shard, row])
                log.warning("bad sample: %s; the next good one of its block takes its place", told)
        check_count(self.names.split, len(self._counted), self.limit)

    def listed(self) -> list[dict[str, Any]]:
        """The bad samples that counted so far, in shard and row order, for a checkpoint."""
        return [asdict(self._bad[place]) for place in sorted(self._counted)]

    def _describe(self, bad: BadSample) -> str:
        return f"{self.names(bad.shard)}: image {bad.key} at offset {bad.offset} {bad.why}"
