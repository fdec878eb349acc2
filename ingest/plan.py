"""Which row goes where, decided before a film is read: a pure function of the tables, the fractions and the seed.

Rows of all sources are numbered through, source after source; that number is what `row` means here.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ingest.config import IngestConfig
from ingest.table import SourceTable
from shards.counter import permutation
from shards.errors import InputError
from shards.schema import NO_GROUP, SPLITS

# Words that keep the two uses of the seed apart.
_SPLIT_STREAM, _SHUFFLE_STREAM = 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Where every row goes."""

    reasons: dict[int, str]
    """Row -> why its report disqualifies it."""
    order: dict[str, NDArray[np.int64]]
    """Split -> its rows in the order of the global shuffle."""
    groups: NDArray[np.int64]
    """(rows,) patient number, NO_GROUP where there is none."""
    ranges: dict[str, tuple[int, int]]
    """Split -> its half-open range of patient numbers; empty without a group column."""
    namesakes: int
    """Patient ids that several sources have although they do not say that their patients are the same."""
    unnamed: tuple[int, ...]
    """Sources in several splits that name no patients although others do: a film of theirs counts as a patient."""

    @property
    def all_rows(self) -> NDArray[np.int64]:
        """(places,) the rows in the order of the shards, split after split, films that will be rejected included."""
        return np.concatenate(list(self.order.values()))

    @property
    def places(self) -> NDArray[np.int64]:
        """(rows,) where each row stands in `all_rows`, -1 for none."""
        places = np.full(len(self.groups), -1)
        places[self.all_rows] = np.arange(sum(map(len, self.order.values())))
        return places


def make_plan(config: IngestConfig, tables: Sequence[SourceTable]) -> Plan:
    """Reject rows without a report, split the others by patient, shuffle each split. InputError if a split is empty."""
    starts = np.concatenate([[0], np.cumsum([table.rows for table in tables])])
    reasons = {int(start) + row: why for table, start in zip(tables, starts, strict=False)
               for row, why in table.reasons.items()}  # fmt: skip
    kept = np.ones(starts[-1], dtype=bool)
    kept[list(reasons)] = False
    rows = np.flatnonzero(kept)
    if not len(rows):
        why, count = Counter(reasons.values()).most_common(1)[0]
        raise InputError(
            f"none of the {len(kept):,} rows has a report ({count:,}: {why}); "
            "look at --text-column, --text-folder, --section"
        )
    codes, known = _codes(tables)
    splits = _split(codes, tables, rows, config)
    _check_shared_files(tables, splits, len(kept))
    order = {
        split: splits[split][permutation(len(splits[split]), config.seed, _SHUFFLE_STREAM, SPLITS.index(split))]
        for split in SPLITS
        if len(splits[split])
    }
    if not known.any():
        groups = np.full(len(kept), NO_GROUP)
        return Plan(reasons=reasons, order=order, groups=groups, ranges={}, namesakes=0, unnamed=())
    groups, ranges = _number_groups(codes, splits)
    unnamed = tuple(
        number
        for number, (table, first, end) in enumerate(zip(tables, starts, starts[1:], strict=False))
        if table.patients is None and sum(((first <= rows) & (rows < end)).any() for rows in splits.values()) > 1
    )
    namesakes = _namesakes(tables)
    return Plan(reasons=reasons, order=order, groups=groups, ranges=ranges, namesakes=namesakes, unnamed=unnamed)


def _codes(tables: Sequence[SourceTable]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(rows,) an integer a patient, and whether the source names any; a row is its own patient where it does not."""
    parts, known, first = [], [], 0
    shared: dict[str, dict[str, int]] = {}
    for table in tables:
        if table.patients is None:
            numbers = first + np.arange(table.rows)
        elif table.namespace is None:
            numbers = first + np.arange(len(table.patient_ids))
        else:
            met = shared.setdefault(table.namespace, {})
            ids = table.patient_ids.to_pylist()
            numbers = np.array([met.setdefault(each, first + place) for place, each in enumerate(ids)], dtype=np.int64)
        parts.append(numbers if table.patients is None else numbers[table.patients])
        known.append(np.full(table.rows, table.patients is not None))
        first += len(numbers)
    return np.concatenate(parts), np.concatenate(known)


def _namesakes(tables: Sequence[SourceTable]) -> int:
    """Ids that several sources, or groups of them that share a namespace, have."""
    spaces: dict[str | int, set[str]] = {}
    for number, table in enumerate(tables):
        spaces.setdefault(table.namespace or number, set()).update(table.patient_ids.to_pylist())
    return sum(times > 1 for times in Counter(itertools.chain(*spaces.values())).values())


def _fixed(tables: Sequence[SourceTable]) -> NDArray[np.int64]:
    """(rows,) index into SPLITS where a source says so, -1 elsewhere."""
    return np.concatenate([np.full(table.rows, -1) if table.splits is None else table.splits for table in tables])


def _split(
    codes: NDArray[np.int64], tables: Sequence[SourceTable], rows: NDArray[np.int64], config: IngestConfig
) -> dict[str, NDArray[np.int64]]:
    """Split -> rows in source order."""
    present, members = np.unique(codes[rows], return_inverse=True)
    split_of = _fixed_groups(len(present), members, tables, rows)
    free = np.flatnonzero(split_of < 0)
    sizes = np.bincount(members, minlength=len(present))
    split_of[free] = _by_fraction(sizes[free], config)
    splits = {split: rows[split_of[members] == number] for number, split in enumerate(SPLITS)}
    asked = {"train": True, "val": config.val_fraction > 0, "test": config.test_fraction > 0}
    for split, wanted in asked.items():
        if wanted and not len(splits[split]):
            raise InputError(
                f"split {split!r} stays empty: {len(rows):,} rows of {len(present):,} groups, "
                f"fractions val {config.val_fraction}, test {config.test_fraction}; give it a larger share"
            )
    return splits


def _fixed_groups(
    groups: int, members: NDArray[np.int64], tables: Sequence[SourceTable], rows: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(groups,) the split that a group's rows name, -1 where none does. InputError for a group in two splits."""
    split_of = np.full(groups, -1, dtype=np.int64)
    fixed = _fixed(tables)[rows]
    named = fixed >= 0
    split_of[members[named]] = fixed[named]
    torn = np.flatnonzero(named & (split_of[members] != fixed))
    if len(torn):
        group = members[torn[0]]
        other = np.flatnonzero((members == group) & (fixed == split_of[group]))[0]
        raise InputError(
            f"{len(np.unique(members[torn])):,} groups have rows in two splits ({_place(rows[torn[0]], tables)} and "
            f"{_place(rows[other], tables)}, for example), which leaks patients; mend --split-column or --split"
        )
    return split_of


def _check_shared_files(tables: Sequence[SourceTable], splits: dict[str, NDArray[np.int64]], rows: int) -> None:
    """Several rows may name one image file (a report each, say), but not in two splits: that film would leak."""
    split_of = np.full(rows, -1)
    for number, split in enumerate(splits):
        split_of[splits[split]] = number
    first_of: dict[str, int] = {}
    for row, path in _files(tables):
        if split_of[row] >= 0 and split_of[first := first_of.setdefault(path, row)] != split_of[row]:
            raise InputError(
                f"{_place(first, tables)} and {_place(row, tables)} name the same image file but fall into two splits, "
                "which leaks it; put them together with --group-column (the column of the files will do) and, in two "
                "sources, --group-namespace, or drop one"
            )


def _files(tables: Sequence[SourceTable]) -> Iterator[tuple[int, str]]:
    """Rows of sources with image files, numbered through, and the path of each."""
    start = 0
    for table in tables:
        for row, name in enumerate(table.names):
            yield start + row, os.path.normpath(os.path.join(table.folder or "", name))
        start += table.rows


def _place(row: int, tables: Sequence[SourceTable]) -> str:
    """A row that is numbered through, for a message."""
    starts = np.cumsum([0, *(table.rows for table in tables)])
    source = int(np.searchsorted(starts, row, side="right")) - 1
    return f"row {row - starts[source]} of source {source}" if len(tables) > 1 else f"row {row}"


def _by_fraction(sizes: NDArray[np.int64], config: IngestConfig) -> NDArray[np.int64]:
    """(groups,) index into SPLITS for groups of `sizes` rows: shuffled, they fill `test`, then `val`, then `train`."""
    shuffled = permutation(len(sizes), config.seed, _SPLIT_STREAM)
    ordered = sizes[shuffled]
    # A patient belongs to the split in which the middle of its rows falls, so shares are met within half a patient.
    middle = (np.cumsum(ordered) - ordered / 2) / max(ordered.sum(), 1)
    test, val = config.test_fraction, config.test_fraction + config.val_fraction
    split_of = np.empty(len(sizes), dtype=np.int64)
    split_of[shuffled] = np.where(middle < test, 2, np.where(middle < val, 1, 0))
    return split_of


def _number_groups(
    codes: NDArray[np.int64], splits: dict[str, NDArray[np.int64]]
) -> tuple[NDArray[np.int64], dict[str, tuple[int, int]]]:
    """Number patients from 0, split by split, in order of first appearance: each split owns a range of its own."""
    groups = np.full(len(codes), NO_GROUP, dtype=np.int64)
    ranges, first = {}, 0
    for split, rows in splits.items():
        if len(rows):
            unique, appears, inverse = np.unique(codes[rows], return_index=True, return_inverse=True)
            rank = np.empty(len(unique), dtype=np.int64)
            rank[np.argsort(appears)] = np.arange(len(unique))
            groups[rows] = first + rank[inverse]
            ranges[split] = (first, first + len(unique))
            first += len(unique)
    return groups, ranges
