"""Counts over one split, block by block, in any order: what `python -m shards stats` says, as plain numbers.

Reports, films and patients are held as 64-bit words, 32 bytes a sample in all; never the reports themselves.
"""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from shards.errors import InputError
from shards.schema import LABEL_PREFIX, NO_GROUP, Manifest

BATCH = 64
"""Batch for which shared reports are counted: that of the recipes."""
LABEL_VALUES = ("1", "0", "-1", "blank", "other")

TALLY_COLUMNS = ("size", "xxh3", "text", "tokens", "token_count", "truncated", "side_words", "group")


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeats:
    """How often samples of a split repeat each other in something."""

    repeating: int
    """Samples that share it with another sample."""
    commonest: int
    """Samples that have the commonest one."""
    pairs_in_batch: float
    """Pairs expected in a batch of BATCH drawn without replacement; each is two false negatives of the loss."""
    twins_in_batch: float
    """Samples of such a batch expected to share it with another one there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitStats:
    """One split in numbers."""

    samples: int
    image_bytes: int
    image_bytes_mean: float
    image_bytes_least: int
    image_bytes_most: int
    tokens_mean: float
    tokens_quantiles: dict[str, int]
    """Tokens of a report, start and end included: least, 50 %, 90 %, 99 %, most."""
    truncated: int
    """Reports that had more tokens than the context holds."""
    side_words: int
    """Reports that name a side."""
    reports: Repeats
    """Reports that are the same, to the letter."""
    tokens: Repeats
    """Reports that are the same to the model: same tokens after cleaning and truncation."""
    duplicate_films: int
    """Films of which another one has the very same bytes."""
    groups: int
    films_per_group_mean: float
    films_per_group_most: int
    ungrouped: int
    """Samples without a group."""
    labels: dict[str, dict[str, int]]
    """Label -> how many samples have 1, 0, -1, a blank, anything else."""


class Tally:
    """Gathers the numbers of one split."""

    def __init__(self, manifest: Manifest, rows: int) -> None:
        """`rows` are all that will be added; of the manifest, only labels and context are looked at."""
        self._labels = manifest.labels
        self._context = manifest.tokenizer.context
        self._filled = 0
        self._texts, self._tokens, self.films = (room(rows, np.uint64) for _ in range(3))
        self._groups = room(rows, np.int64)
        self._lengths = np.zeros(1 << 16, dtype=np.int64)
        self._sizes: list[tuple[int, int, int]] = []
        self._flags = {"truncated": 0, "side_words": 0}
        self._values = np.zeros((len(manifest.labels), len(LABEL_VALUES)), dtype=np.int64)

    def add(self, table: pa.Table) -> None:
        """Take in one block: TALLY_COLUMNS and the labels."""
        rows = slice(self._filled, self._filled + table.num_rows)
        self._filled = rows.stop
        self._texts[rows] = [xxh3_64_intdigest(text.encode()) for text in table["text"].to_pylist()]
        tokens = table["tokens"].combine_chunks().flatten().to_numpy().reshape(-1, self._context)
        self._tokens[rows] = [xxh3_64_intdigest(line.data) for line in np.ascontiguousarray(tokens)]
        self.films[rows] = table["xxh3"].to_numpy()
        self._groups[rows] = table["group"].to_numpy()
        self._lengths += np.bincount(table["token_count"].to_numpy(), minlength=len(self._lengths))
        sizes = table["size"].to_numpy()
        self._sizes.append((int(sizes.sum()), int(sizes.min()), int(sizes.max())))
        for name in self._flags:
            self._flags[name] += int(table[name].to_numpy().sum())
        for number, label in enumerate(self._labels):
            self._values[number] += _count_values(table[LABEL_PREFIX + label].to_numpy())

    def stats(self) -> SplitStats:
        """The numbers, once every block was taken in."""
        sizes = np.array(self._sizes, dtype=np.int64)
        grouped = self._groups[self._groups != NO_GROUP]
        per_group = np.unique(grouped, return_counts=True)[1]
        total = int(self._lengths @ np.arange(len(self._lengths)))
        return SplitStats(
            samples=self._filled,
            image_bytes=int(sizes[:, 0].sum()),
            image_bytes_mean=float(sizes[:, 0].sum() / self._filled),
            image_bytes_least=int(sizes[:, 1].min()),
            image_bytes_most=int(sizes[:, 2].max()),
            tokens_mean=total / self._filled,
            tokens_quantiles=_quantiles(self._lengths),
            reports=repeats(self._texts),
            tokens=repeats(self._tokens),
            duplicate_films=repeats(self.films).repeating,
            groups=len(per_group),
            films_per_group_mean=float(per_group.mean()) if len(per_group) else 0.0,
            films_per_group_most=int(per_group.max(initial=0)),
            ungrouped=self._filled - len(grouped),
            labels={
                label: dict(zip(LABEL_VALUES, map(int, counts), strict=True))
                for label, counts in zip(self._labels, self._values, strict=True)
            },
            **self._flags,
        )


def room(rows: int, kind: type[np.generic]) -> NDArray:
    """(rows,) zeros that cost nothing before they are filled: a manifest may say any number."""
    try:
        return np.zeros(rows, dtype=kind)
    except (MemoryError, ValueError):
        raise InputError(f"the manifest names {rows:,} rows, more than fit this machine's memory") from None


def _count_values(values: NDArray) -> NDArray[np.int64]:
    """(len(LABEL_VALUES),) how many of (n,) label values are each."""
    known = [int((values == float(value)).sum()) for value in LABEL_VALUES[:3]]
    blank = int(np.isnan(values.astype(np.float64)).sum())
    return np.array([*known, blank, len(values) - sum(known) - blank])


def _quantiles(counts: NDArray[np.int64]) -> dict[str, int]:
    """Quantiles of whole numbers from how often each appears."""
    below = np.cumsum(counts)
    wanted = {"least": 1, "50 %": below[-1] * 0.5, "90 %": below[-1] * 0.9, "99 %": below[-1] * 0.99, "most": below[-1]}
    return {name: int(np.searchsorted(below, rank)) for name, rank in wanted.items()}


def repeats(hashes: NDArray[np.uint64], batch: int = BATCH) -> Repeats:
    """How often the samples whose (n,) hashes these are repeat each other; exact, batches being random draws."""
    n = len(hashes)
    counts = np.unique(hashes, return_counts=True)[1].astype(np.float64)
    batch = min(batch, n)
    same = float((counts * (counts - 1)).sum()) / (n * (n - 1)) if n > 1 else 0.0
    sizes, times = np.unique(counts, return_counts=True)
    alone = np.array([_no_other(int(size), n, batch) for size in sizes])
    return Repeats(
        repeating=int(counts[counts > 1].sum()),
        commonest=int(counts.max(initial=0)),
        pairs_in_batch=same * batch * (batch - 1) / 2,
        twins_in_batch=batch * float((sizes * times * (1 - alone)).sum()) / n,
    )


def _no_other(size: int, n: int, batch: int) -> float:
    """Chance that of `size` samples among n one is alone in its batch: C(n - size, batch - 1) / C(n - 1, batch - 1)."""
    if size == 1:
        return 1.0
    if n - size < batch - 1:
        return 0.0
    return math.exp(_log_choose(n - size, batch - 1) - _log_choose(n - 1, batch - 1))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
