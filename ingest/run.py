"""An ingest from end to end: check everything, plan, encode in source order, assemble in shuffled order, sign.

Both phases can be interrupted at any moment; the same command goes on and ends with the same bytes.
"""

import contextlib
import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from ingest.assemble import AssembleTask, assemble_shard, shard_tasks
from ingest.config import IngestConfig
from ingest.encode import EncodeTask, encode_range
from ingest.fingerprint import fingerprint
from ingest.images import Fault
from ingest.inputs import Inputs, read_inputs
from ingest.plan import Plan
from ingest.report import Report, make_report, write_report
from ingest.rows import Reports, check_texts, write_rows
from ingest.spill import read_records, spill_path
from ingest.trial import settle
from ingest.workdir import check_unchanged, open_work, remove_work
from shards.atomic import write_atomic
from shards.cli import say
from shards.errors import InputError
from shards.manifest import signed, write_manifest
from shards.processes import Processes
from shards.progress import progress
from shards.schema import (
    REJECTS_NAME,
    SCHEMA_VERSION,
    ImageSpec,
    Manifest,
    ShardInfo,
    SourceInfo,
    TokenizerSpec,
    block_rows_for,
)
from shards.stats import add_tables, make_stats, new_tallies
from shards.tally import Tally

if TYPE_CHECKING:
    from ingest.cluster import Cluster

    Pool = Processes | Cluster

_MEASURED = 64
"""What the encoding loses is measured on so many films at least, evenly spread."""


def ingest(config: IngestConfig) -> Report:
    """Run an ingest; returns what came of it.

    InputError for whatever is wrong with the input, before anything is written where possible.
    """
    begun = fingerprint(config)
    inputs = read_inputs(config)
    config, lines = settle(config, inputs)
    for line in (*inputs.notes, *lines):
        say(line)
    with open_work(config, begun) as work:
        with open_pool(config, inputs, work) as pool:
            tokenizer = _encode(config, inputs, work, pool)
            check_unchanged(config, work)
            records = read_records(work, inputs.spill_starts)
            rejects = _rejects(inputs.plan, records)
            _check_rejects(config, inputs, rejects)
            order = _accepted(inputs.plan, rejects)
            draft = _draft(config, inputs, tokenizer, records, order)
            tasks = shard_tasks(config, draft, inputs, records, order, work)
            tallies = new_tallies(draft, {split: len(rows) for split, rows in order.items()})
            manifest = signed(_assemble(config.to_shards, draft, tasks, tallies, pool))
        _write_rejects(config.to_shards, inputs, rejects)
        report = make_report(manifest, inputs, records, rejects, make_stats(manifest, tallies))
        write_report(config.to_shards, report)
        write_manifest(config.to_shards, manifest)
    remove_work(config.to_shards)
    return report


@contextlib.contextmanager
def open_pool(config: IngestConfig, inputs: Inputs, work: Path) -> Iterator["Pool"]:
    """Who does the tasks: processes here, or a Dask cluster. `work` is the folder of what is being made."""
    if config.scheduler is None:
        with Processes(config.worker_count) as processes:
            yield processes
    else:
        from ingest.cluster import open_cluster

        with open_cluster(config.scheduler, config.scheduler_wait, inputs.sources, work) as cluster:
            yield cluster


def _image_spec(config: IngestConfig, inputs: Inputs) -> ImageSpec:
    return ImageSpec(height=inputs.height, width=inputs.width, codec=config.encoding, quality=config.quality)


def _encode(config: IngestConfig, inputs: Inputs, work: Path, pool: "Pool") -> TokenizerSpec:
    """Phase one. A thread of this process tokenises while the workers encode."""
    check_texts(work, inputs.texts)
    places = inputs.plan.places
    reports = Reports(order=inputs.plan.all_rows, texts=inputs.texts, groups=inputs.plan.groups, labels=inputs.labels)
    tasks = (
        EncodeTask(
            source=inputs.sources[each.source],
            first=each.first,
            end=each.end,
            files=inputs.files[each.source],
            names=tuple(inputs.tables[each.source].names[each.first : each.end]),
            places=places[each.start : each.start + each.end - each.first],
            image=_image_spec(config, inputs),
            measure_every=max(1, inputs.rows // _MEASURED),
            spill=spill_path(work, each.start),
        )
        for each in inputs.ranges
    )
    with ThreadPoolExecutor(1) as thread:
        tokenizer = thread.submit(write_rows, work, reports)
        with progress("encode", inputs.rows, "film", keep=True) as advance:
            for done in pool.map_unordered(encode_range, tasks):
                advance(done)
        return tokenizer.result()


def _rejects(plan: Plan, records: NDArray[np.void]) -> dict[int, str]:
    """Every row that does not become a sample -> all that is wrong with it."""
    reasons = {row: [reason] for row, reason in plan.reasons.items()}
    for row in np.flatnonzero(records["fault"]):
        reasons.setdefault(int(row), []).append(Fault(records["fault"][row]).reason)
    return {row: "; ".join(found) for row, found in sorted(reasons.items())}


def _check_rejects(config: IngestConfig, inputs: Inputs, rejects: dict[int, str]) -> None:
    if len(rejects) > config.max_rejects * inputs.rows:
        why, count = Counter(rejects.values()).most_common(1)[0]
        raise InputError(
            f"{len(rejects):,} of {inputs.rows:,} rows are rejected ({count:,}: {why}), more than --max-rejects "
            f"{config.max_rejects:g}; look at the columns and the films, or allow it"
        )


def _accepted(plan: Plan, rejects: dict[int, str]) -> dict[str, NDArray[np.int64]]:
    """Split -> its rows in shuffled order, rejects dropped out."""
    bad = np.fromiter(rejects, dtype=np.int64, count=len(rejects))
    order = {split: rows[~np.isin(rows, bad)] for split, rows in plan.order.items()}
    for split, rows in order.items():
        if not len(rows):
            raise InputError(
                f"every film of split {split!r} was rejected; give it a larger share, or look at the films"
            )
    return order


def _draft(
    config: IngestConfig,
    inputs: Inputs,
    tokenizer: TokenizerSpec,
    records: NDArray[np.void],
    order: dict[str, NDArray[np.int64]],
) -> Manifest:
    """The manifest before there are shards."""
    samples = sum(map(len, order.values()))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        image=_image_spec(config, inputs),
        tokenizer=tokenizer,
        labels=inputs.label_names,
        block_rows=block_rows_for(samples, float(records["size"].sum()) / samples),
        seed=config.seed,
        sources=_source_infos(inputs, records, order),
        splits=dict.fromkeys(order, ()),
        groups=inputs.plan.ranges,
    )


def _assemble(
    out: Path, draft: Manifest, tasks: Iterator[AssembleTask], tallies: dict[str, Tally], pool: "Pool"
) -> Manifest:
    """Phase two: the manifest with its shards. Each table is read again, and counted, while others are written."""
    found: dict[str, list[ShardInfo]] = {split: [] for split in draft.splits}
    samples = sum(source.samples for source in draft.sources)
    with progress("assemble", samples, "film", keep=True) as advance:
        for info in pool.map_unordered(assemble_shard, tasks):
            split = info.name.split("-")[0]
            found[split].append(info)
            for rows in add_tables(out, dataclasses.replace(draft, splits={split: (info,)}), tallies):
                advance(rows)
    splits = {split: tuple(sorted(infos, key=lambda info: info.name)) for split, infos in found.items()}
    return dataclasses.replace(draft, splits=splits)


def _source_infos(
    inputs: Inputs, records: NDArray[np.void], order: dict[str, NDArray[np.int64]]
) -> tuple[SourceInfo, ...]:
    source_of, starts = inputs.source_of, inputs.starts
    samples = np.bincount(source_of[np.concatenate(list(order.values()))], minlength=len(inputs.tables))
    return tuple(
        SourceInfo(
            kind="images" if source.images else "hdf5",
            rows=inputs.tables[number].rows,
            samples=int(samples[number]),
            digest=xxh3_128_hexdigest(records["pixels"][starts[number] : starts[number + 1]].tobytes()),
        )
        for number, source in enumerate(inputs.sources)
    )


def _write_rejects(out: Path, inputs: Inputs, rejects: dict[int, str]) -> None:
    source_of, starts = inputs.source_of, inputs.starts
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["source", "row", "reason"])
    for row, reason in rejects.items():
        writer.writerow([source_of[row], row - starts[source_of[row]], reason])
    write_atomic(out / REJECTS_NAME, text.getvalue().encode())
