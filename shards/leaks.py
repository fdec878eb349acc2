"""What only all shards together show: a key that appears twice, a patient in two splits, a miscounted source."""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError
from shards.schema import NO_GROUP, Manifest, sample_key

_COMPACT = 1 << 20
"""Group numbers of a split to gather before doubles are dropped."""


class Leaks:
    """Gathers what each shard holds. One byte a source row for the keys, eight a patient for the groups."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        # Zeroed lazily by the system: a row that no sample came from costs nothing.
        self._seen = [_zeros(source.rows) for source in manifest.sources]
        self._groups: dict[str, list[NDArray[np.int64]]] = {split: [] for split in manifest.splits}
        self._counts = np.zeros(len(manifest.sources), dtype=np.int64)

    def add(
        self, shard: str, source: NDArray[np.uint8], row: NDArray[np.int64], groups: NDArray[np.int64]
    ) -> str | None:
        """Take in one shard's keys, (rows,) each, and its patients; returns what is wrong with the keys, or None."""
        self._add_groups(shard.rsplit("-", 1)[0], groups[groups != NO_GROUP])
        for number in np.unique(source):
            problem = self._add_keys(shard, int(number), row[source == number])
            if problem:
                return problem
        return None

    def problems(self, *, complete: bool) -> Iterator[str]:
        """What is wrong with the whole, once every shard was taken in, and completely."""
        for one, other in itertools.combinations(self._groups, 2):
            both = np.intersect1d(self._gathered(one), self._gathered(other))
            if len(both):
                yield (
                    f"{len(both):,} groups are in {one} and in {other} (leak), group {both[0]} first; "
                    "ingest again with --group-column"
                )
        for number, source in enumerate(self._manifest.sources):
            if complete and self._counts[number] != source.samples:
                yield (
                    f"source {number:02d} has {self._counts[number]:,} samples, the manifest says {source.samples:,}; "
                    "ingest again"
                )

    def _add_keys(self, shard: str, source: int, rows: NDArray[np.int64]) -> str | None:
        if source >= len(self._seen) or rows.min() < 0 or rows.max() >= len(self._seen[source]):
            return f"shard {shard}: a key names a row that source {source:02d} does not have; ingest again"
        seen = self._seen[source]
        unique, counts = np.unique(rows, return_counts=True)
        double = np.concatenate([unique[counts > 1], unique[seen[unique]]])
        if len(double):
            key = sample_key(source, int(double.min()))
            return f"shard {shard}: key {key} appears twice in the data set; ingest again"
        seen[unique] = True
        self._counts[source] += len(unique)
        return None

    def _add_groups(self, split: str, groups: NDArray[np.int64]) -> None:
        gathered = self._groups[split]
        gathered.append(groups)
        if sum(map(len, gathered)) > _COMPACT + 2 * len(gathered[0]):
            gathered[:] = [self._gathered(split)]

    def _gathered(self, split: str) -> NDArray[np.int64]:
        return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *self._groups[split]]))


def _zeros(rows: int) -> NDArray[np.bool_]:
    try:
        return np.zeros(rows, dtype=bool)
    except (MemoryError, ValueError):
        raise InputError(
            f"the manifest names a source of {rows!r} rows, more than a key can count; ingest again"
        ) from None
