"""Which row goes where, decided before a film is read: pure functions of CSV columns, fractions and seed."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ingest.config import IngestConfig
from shards.counter import permutation
from shards.errors import InputError
from shards.schema import NO_GROUP, SPLITS

# Words that keep the two uses of the seed apart.
_SPLIT_STREAM, _SHUFFLE_STREAM = 1, 2

REPORT_EMPTY = "report is empty"
REPORT_MISSING = "report is missing"


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


def make_plan(config: IngestConfig, texts: pa.ChunkedArray, patients: pa.ChunkedArray | None) -> Plan:
    """Reject rows without a report, split the others by patient, shuffle each split. InputError if a split is empty."""
    reasons = _missing_reports(texts, config.missing_text)
    kept = np.ones(len(texts), dtype=bool)
    kept[list(reasons)] = False
    rows = np.flatnonzero(kept)
    if not len(rows):
        raise InputError(f"none of the {len(texts):,} rows has a report in column {config.text_column!r}")
    codes = _codes(config, patients, len(texts))
    splits = _split(codes, rows, config)
    order = {
        split: splits[split][permutation(len(splits[split]), config.seed, _SHUFFLE_STREAM, SPLITS.index(split))]
        for split in SPLITS
        if len(splits[split])
    }
    if patients is None:
        return Plan(reasons=reasons, order=order, groups=np.full(len(texts), NO_GROUP), ranges={})
    groups, ranges = _number_groups(codes, splits)
    return Plan(reasons=reasons, order=order, groups=groups, ranges=ranges)


def _missing_reports(texts: pa.ChunkedArray, missing: str) -> dict[int, str]:
    stripped = pc.utf8_trim_whitespace(texts)
    empty = np.flatnonzero(pc.equal(stripped, "").to_numpy())
    named = np.flatnonzero(pc.equal(pc.utf8_lower(stripped), missing.strip().lower()).to_numpy())
    reasons = dict.fromkeys(map(int, named), REPORT_MISSING)
    return reasons | dict.fromkeys(map(int, empty), REPORT_EMPTY)


def _codes(config: IngestConfig, patients: pa.ChunkedArray | None, rows: int) -> NDArray[np.int64]:
    """(rows,) an integer a patient, or a row where there are none."""
    if patients is None:
        return np.arange(rows)
    blank = np.flatnonzero(pc.equal(pc.utf8_trim_whitespace(patients), "").to_numpy())
    if len(blank):
        raise InputError(f"{len(blank):,} rows have no {config.group_column!r}, row {blank[0]} first; fill them in")
    return patients.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)


def _split(codes: NDArray[np.int64], rows: NDArray[np.int64], config: IngestConfig) -> dict[str, NDArray[np.int64]]:
    """Split -> rows in source order. Shuffled patients fill `test`, then `val`; `train` has the rest."""
    present, members = np.unique(codes[rows], return_inverse=True)
    shuffled = permutation(len(present), config.seed, _SPLIT_STREAM)
    sizes = np.bincount(members, minlength=len(present))[shuffled]
    # A patient belongs to the split in which the middle of its rows falls, so shares are met within half a patient.
    middle = (np.cumsum(sizes) - sizes / 2) / len(rows)
    test, val = config.test_fraction, config.test_fraction + config.val_fraction
    split_of = np.empty(len(present), dtype=np.int64)
    split_of[shuffled] = np.where(middle < test, 2, np.where(middle < val, 1, 0))
    splits = {split: rows[split_of[members] == number] for number, split in enumerate(SPLITS)}
    wanted = {"train": True, "val": config.val_fraction > 0, "test": config.test_fraction > 0}
    for split, asked in wanted.items():
        if asked and not len(splits[split]):
            raise InputError(
                f"split {split!r} stays empty: {len(rows):,} rows of {len(present):,} groups, "
                f"fractions val {config.val_fraction}, test {config.test_fraction}; give it a larger share"
            )
    return splits


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
