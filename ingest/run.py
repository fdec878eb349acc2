"""An ingest from end to end: check everything, plan, encode in source order, assemble in shuffled order, sign.

Both phases can be interrupted at any moment; the same command goes on and ends with the same bytes.
"""

import csv
import io
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm
from xxhash import xxh3_128_hexdigest

from ingest.assemble import AssembleTask, assemble_shard
from ingest.config import IngestConfig
from ingest.encode import FILM_REASONS, RANGE_ROWS, EncodeTask, Spills, encode_range, spill_path
from ingest.plan import Plan, make_plan
from ingest.pool import Pool
from ingest.reports import parse_labels, read_columns
from ingest.source import H5Source
from ingest.text import Words, read_words
from ingest.workdir import open_work, remove_work
from shards.atomic import write_atomic
from shards.errors import InputError
from shards.manifest import write_manifest
from shards.schema import (
    REJECTS_NAME,
    SCHEMA_VERSION,
    ImageSpec,
    Manifest,
    ShardInfo,
    SourceInfo,
    block_rows_for,
    shard_name,
)

_SAMPLE_OVERHEAD = 2500
"""Bytes a sample takes in the tar beside its image: three headers, report, labels, padding. For sizing shards only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What was read before the first film."""

    rows: int
    height: int
    width: int
    texts: pa.ChunkedArray
    """(rows,)"""
    labels: NDArray[np.float32]
    """(rows, labels)"""
    plan: Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of an ingest."""

    manifest: Manifest
    rejects: dict[int, str]
    """Source row -> why."""
    psnr: float
    """dB, of the JPEG against the source, over the films measured."""
    resized_psnr: float
    """dB, both resized to 224 x 224 first."""
    resized_difference: float
    """Mean absolute difference after that resize, grey levels."""


def ingest(config: IngestConfig) -> Outcome:
    """Run an ingest. InputError for whatever is wrong with the input, before anything is written where possible."""
    inputs = read_inputs(config)
    work = open_work(config)
    with Pool(config.worker_count) as pool:
        words = _encode(config, inputs, work, pool)
        spills = Spills(work, inputs.rows)
        spills.close()
        rejects = _rejects(inputs.plan, spills)
        order = _accepted(inputs.plan, rejects)
        manifest = _assemble(config, inputs, words, spills, order, pool, work)
    _write_rejects(config.to_shards, rejects)
    write_manifest(config.to_shards, manifest)
    remove_work(config.to_shards)
    errors = {name: float(np.nanmean(spills.records[name])) for name in ("error", "resized_error")}
    difference = float(np.nanmean(spills.records["resized_difference"]))
    return Outcome(
        manifest=manifest,
        rejects=rejects,
        psnr=_psnr(errors["error"]),
        resized_psnr=_psnr(errors["resized_error"]),
        resized_difference=difference,
    )


def read_inputs(config: IngestConfig) -> Inputs:
    """Read the CSV files, look at the HDF5 file, refuse what does not fit, and plan."""
    with H5Source(config.h5, config.dataset) as source:
        rows, height, width = source.rows, source.height, source.width
    group = (config.group_column,) if config.group_column else ()
    names = tuple(dict.fromkeys((config.text_column, *config.label_columns, *group)))
    columns = read_columns(config.csv, names)
    texts = columns[config.text_column]
    if len(texts) != rows:
        raise InputError(
            f"{config.h5} has {rows:,} films but the CSV has {len(texts):,} rows; row i must describe film i"
        )
    labels = parse_labels(columns, config.label_columns, rows)
    plan = make_plan(config, texts, columns[config.group_column] if config.group_column else None)
    return Inputs(rows=rows, height=height, width=width, texts=texts, labels=labels, plan=plan)


def _encode(config: IngestConfig, inputs: Inputs, work: Path, pool: Pool) -> Words:
    """Phase one. A thread of this process tokenises while the workers encode."""
    wanted = np.ones(inputs.rows, dtype=bool)
    wanted[list(inputs.plan.reasons)] = False
    tasks = (
        EncodeTask(
            h5=config.h5,
            dataset=config.dataset,
            first=first,
            end=min(first + RANGE_ROWS, inputs.rows),
            wanted=wanted[first : first + RANGE_ROWS],
            quality=config.quality,
            spill=spill_path(work, first),
        )
        for first in range(0, inputs.rows, RANGE_ROWS)
    )
    with ThreadPoolExecutor(1) as thread:
        words = thread.submit(read_words, inputs.texts, wanted)
        with tqdm(total=inputs.rows, unit="film", desc="encode", disable=None, mininterval=0.5) as progress:
            for done in pool.map_unordered(encode_range, tasks):
                progress.update(done)
        return words.result()


def _rejects(plan: Plan, spills: Spills) -> dict[int, str]:
    """Every row that does not become a sample -> all that is wrong with it."""
    reasons = {row: [reason] for row, reason in plan.reasons.items()}
    for row in np.flatnonzero(spills.records["reason"]):
        reasons.setdefault(int(row), []).append(FILM_REASONS[int(spills.records["reason"][row])])
    return {row: "; ".join(found) for row, found in sorted(reasons.items())}


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


def _assemble(
    config: IngestConfig,
    inputs: Inputs,
    words: Words,
    spills: Spills,
    order: dict[str, NDArray[np.int64]],
    pool: Pool,
    work: Path,
) -> Manifest:
    """Phase two, and the manifest that describes it."""
    image = ImageSpec(height=inputs.height, width=inputs.width, quality=config.quality)
    samples = sum(map(len, order.values()))
    mean_bytes = float(spills.records["size"].sum()) / samples
    block_rows = block_rows_for(samples, mean_bytes)

    def tasks() -> Iterator[AssembleTask]:
        for name, rows in _cut_shards(order, mean_bytes + _SAMPLE_OVERHEAD, config.shard_mb * 1e6):
            yield AssembleTask(
                folder=config.to_shards,
                work=work,
                name=name,
                source_rows=inputs.rows,
                image=image,
                labels=config.label_columns,
                block_rows=block_rows,
                group_range=inputs.plan.ranges.get(name.split("-")[0]),
                rows=rows,
                texts=inputs.texts.take(rows).to_pylist(),
                tokens=words.tokens[rows],
                token_counts=words.counts[rows],
                truncated=words.truncated[rows],
                side_words=words.sides[rows],
                groups=inputs.plan.groups[rows],
                values=inputs.labels[rows],
            )

    infos: dict[str, ShardInfo] = {}
    with tqdm(total=samples, unit="film", desc="assemble", disable=None, mininterval=0.5) as progress:
        for info in pool.map_unordered(assemble_shard, tasks()):
            infos[info.name] = info
            progress.update(info.rows)
    source = SourceInfo(
        kind="hdf5", rows=inputs.rows, samples=samples, digest=xxh3_128_hexdigest(spills.records["pixels"].tobytes())
    )
    splits = {split: tuple(infos[name] for name in sorted(infos) if name.startswith(f"{split}-")) for split in order}
    return Manifest(
        schema_version=SCHEMA_VERSION,
        image=image,
        tokenizer=words.spec,
        labels=config.label_columns,
        block_rows=block_rows,
        seed=config.seed,
        sources=(source,),
        splits=splits,
        groups=inputs.plan.ranges,
    )


def _cut_shards(
    order: dict[str, NDArray[np.int64]], sample_bytes: float, shard_bytes: float
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Names and rows of the shards: each split in nearly equal parts of about `shard_bytes`."""
    for split, rows in order.items():
        count = min(len(rows), math.ceil(len(rows) * sample_bytes / shard_bytes))
        for number, part in enumerate(np.array_split(rows, count)):
            yield shard_name(split, number), part


def _write_rejects(out: Path, rejects: dict[int, str]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["source", "row", "reason"])
    writer.writerows([0, row, reason] for row, reason in rejects.items())
    write_atomic(out / REJECTS_NAME, text.getvalue().encode())


def _psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 255."""
    return 10 * math.log10(255**2 / mean_squared_error) if mean_squared_error else math.inf
