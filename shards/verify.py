"""`python -m shards verify DIR`: every byte of everything.

Each shard is audited by itself (`shards.audit`); keys and patients are then compared across shards, in this process,
from what each shard reports of itself. Memory: one block a worker, a byte a source row, eight a patient.

A film costs 58 us of one CPU, 380 with its JPEG decoded (EPYC, 27 KB a film). Of the former most is making the bytes
anew under the interpreter lock, so shards go to processes, not to threads.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm
from tyro.conf import Positional

from shards import schema
from shards.audit import Audit, Decode
from shards.cli import say
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.processes import Processes
from shards.progress import progress
from shards.schema import NO_GROUP, Manifest, ShardInfo, sample_key
from shards.tally import room

DECODE = 16
"""Images of a shard to decode by default."""

RETOKENIZE_NAME = ".retokenize"
"""Folder in a data set that an unfinished `ingest.retokenize` leaves; the set is whole all the same."""

_WORTH_PROCESSES = 50_000
"""Samples, a decoded one counting for seven, from which on processes pay (2.5 s alone; starting two takes 1 to 2)."""

_COMPACT = 1 << 20
"""Group numbers of a split to gather before doubles are dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What one shard reports of itself."""

    name: str
    problem: str | None
    source: NDArray[np.uint8]
    """(rows,) with `row`, what the keys say."""
    row: NDArray[np.int64]
    groups: NDArray[np.int64]
    """The patients in it, each once, NO_GROUP among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Check every byte of a data set against its manifest."""

    root: Positional[Path]
    """Folder of shards."""
    workers: int | None = None
    """Processes; none: one for each CPU that this job may use, or this one alone where the set is small."""
    decode: Decode = DECODE
    """Images of each shard to decode, or `all`."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers {self.workers} is not a positive number")
        if self.decode != "all" and self.decode < 0:
            raise InputError(f"--decode {self.decode} is neither a number of images nor `all`")


def run(config: VerifyConfig) -> None:
    """Print each problem; InputError at the end if there was one."""
    manifest = read_manifest(config.root)
    samples = manifest.samples
    rows = {info.name: info.rows for shards in manifest.splits.values() for info in shards}
    decoded = sum(count if config.decode == "all" else min(count, config.decode) for count in rows.values())
    cpus = len(os.sched_getaffinity(0)) if samples + 6 * decoded >= _WORTH_PROCESSES else 1
    problems = []
    with progress("verify", samples, "film") as advance:
        for name, problem in verify(config.root, workers=config.workers or cpus, decode=config.decode):
            advance(rows.get(name, 0))
            if problem:
                problems.append(problem)
                tqdm.write(problem, file=sys.stdout)
    if problems:
        raise InputError(f"{len(problems)} problems in {config.root}, the first: {problems[0]}")
    several = len(manifest.sources) > 1  # whose patients are taken for different people
    say(
        f"{config.root}: {len(rows)} shards, {samples:,} samples, every byte as ingested; "
        f"{decoded:,} images decoded, no key twice, no patient {'of a source ' * several}in two splits"
    )


def verify(root: Path, *, workers: int = 1, decode: Decode = DECODE) -> Iterator[tuple[str, str | None]]:
    """Check a data set shard by shard; yields (name, problem or None) for each, then problems of the whole.

    Keys must be unique and patients in one split only, over all shards; a file that the manifest does not know is a
    problem of the folder. `decode` images a shard are decoded. InputError without a manifest.
    """
    manifest = read_manifest(root)
    leaks, sound = Leaks(manifest), True
    for checked in _check_all(root, manifest, workers, decode):
        double = leaks.add(checked.name, checked.source, checked.row, checked.groups)
        sound &= not checked.problem
        yield checked.name, checked.problem or double
    for problem in leaks.problems(complete=sound):
        yield "folder", problem
    stray = _stray_files(root, manifest)
    if RETOKENIZE_NAME in stray:
        yield "folder", f"{RETOKENIZE_NAME} is left of an unfinished retokenize; run python -m ingest.retokenize again"
        stray.remove(RETOKENIZE_NAME)
    if stray:
        yield "folder", f"{len(stray)} files the manifest does not know, {stray[0]} first"


def _check_all(root: Path, manifest: Manifest, workers: int, decode: Decode) -> Iterator[Checked]:
    infos = [info for shards in manifest.splits.values() for info in shards]
    check = partial(_check, root, manifest, decode)
    if min(workers, len(infos)) <= 1:
        yield from map(check, infos)
        return
    with Processes(min(workers, len(infos))) as pool:
        yield from pool.map(check, infos)


def _check(root: Path, manifest: Manifest, decode: Decode, info: ShardInfo) -> Checked:
    """Check one shard by itself. Runs in worker processes."""
    audit = Audit(root, manifest, info, decode)
    problem = None
    try:
        audit.run()
    except InputError as error:
        problem = str(error)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        # Whatever values that no writer of ours makes lead to: text that is not UTF-8, say.
        problem = f"shard {info.name}: its table makes no sense ({type(error).__name__}); ingest again"
    return Checked(
        name=info.name,
        problem=problem,
        source=np.concatenate([np.empty(0, np.uint8), *audit.sources]),
        row=np.concatenate([np.empty(0, np.int64), *audit.rows]),
        groups=np.unique(np.concatenate([np.empty(0, np.int64), *audit.groups])),
    )


def _stray_files(root: Path, manifest: Manifest) -> list[str]:
    known = {schema.MANIFEST_NAME, schema.REJECTS_NAME, schema.REPORT_NAME, schema.REPORT_PAGE_NAME, schema.INPUTS_NAME}
    for shards in manifest.splits.values():
        known |= {f"{info.name}.{suffix}" for info in shards for suffix in ("tar", "idx", "parquet")}
    return sorted(name for name in os.listdir(root) if name not in known)


class Leaks:
    """Gathers what each shard holds. One byte a source row for the keys, eight a patient for the groups."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        # Zeroed lazily by the system: a row that no sample came from costs nothing.
        self._seen = [room(source.rows, np.bool_) for source in manifest.sources]
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
