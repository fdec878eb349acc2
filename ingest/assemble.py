"""Phase two: one shard at a time from the spills, in the order of the global shuffle. Runs in worker processes."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ingest.rows import RowReader
from ingest.spill import Images, SpillReader
from shards.atomic import write_atomic
from shards.digest import file_digest
from shards.reader import check_file
from shards.schema import FileInfo, Manifest, ShardInfo, shard_count, shard_name
from shards.writer import Sample, ShardWriter

if TYPE_CHECKING:  # no worker needs them
    from ingest.config import IngestConfig
    from ingest.inputs import Inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class AssembleTask:
    """One shard: its n rows, in order, with everything about them that is not in the spills."""

    folder: Path
    """Where the shard goes."""
    work: Path
    """Where the spills and the notes on finished shards lie."""
    name: str
    starts: NDArray[np.int64]
    """(spills,) first row of each spill, all sources counted through."""
    draft: Manifest
    """Of the set, before there are shards."""
    places: NDArray[np.int64]
    """(n,) of its n rows, in the order of all shards."""
    images: Images
    """Of the same rows."""
    sources: NDArray[np.int64]
    """(n,) source of each row."""
    source_rows: NDArray[np.int64]
    """(n,) row in the source."""


def shard_tasks(
    config: "IngestConfig",
    draft: Manifest,
    inputs: "Inputs",
    records: NDArray[np.void],
    order: dict[str, NDArray[np.int64]],
    work: Path,
) -> Iterator[AssembleTask]:
    """The shards of each split, from its rows in `order` and the `records` (rows,) of phase one."""
    source_of, starts = inputs.source_of, inputs.starts
    places, spill_starts = inputs.plan.places, inputs.spill_starts
    mean_bytes = float(records["size"].sum()) / sum(map(len, order.values()))
    for name, rows in _cut_shards(order, mean_bytes, config.shard_mb * 1e6):
        yield AssembleTask(
            folder=config.to_shards,
            work=work,
            name=name,
            starts=spill_starts,
            draft=draft,
            places=places[rows],
            images=Images(
                rows=rows,
                offsets=records["offset"][rows],
                sizes=records["size"][rows],
                hashes=records["xxh3"][rows],
            ),
            sources=source_of[rows],
            source_rows=rows - starts[source_of[rows]],
        )


def _cut_shards(
    order: dict[str, NDArray[np.int64]], mean_bytes: float, shard_bytes: float
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Names and rows of the shards: each split in nearly equal parts of about `shard_bytes`."""
    for split, rows in order.items():
        for number, part in enumerate(np.array_split(rows, shard_count(len(rows), mean_bytes, shard_bytes))):
            yield shard_name(split, number), part


def assemble_shard(task: AssembleTask) -> ShardInfo:
    """Write one shard and a note that it is finished; a shard that has its note and its files is kept."""
    note = task.work / f"{task.name}.json"
    finished = _read_note(note, task.folder)
    if finished:
        return finished
    writer = ShardWriter.of(task.draft, task.folder, task.name)
    with contextlib.closing(SpillReader(task.work, task.starts)) as spills, RowReader(task.work) as rows, writer:
        known = zip(
            task.sources.tolist(),
            task.source_rows.tolist(),
            spills.read(task.images),
            rows.read(task.places),
            strict=True,
        )
        for source, number, image, row in known:
            writer.add(Sample(source, number, image, *row))
    write_atomic(note, json.dumps(asdict(writer.info)).encode())
    return writer.info


def _read_note(note: Path, folder: Path) -> ShardInfo | None:
    """The shard that a note describes, if its files are there, every byte as noted."""
    try:
        fields = json.loads(note.read_bytes())
        files = {kind: FileInfo(**fields[kind]) for kind in ("tar", "idx", "parquet")}
        info = ShardInfo(**fields | files)
        for kind, expected in files.items():
            path = folder / f"{info.name}.{kind}"
            check_file(path, expected)
            if file_digest(path) != expected.xxh3:  # the size survives a power loss that the content does not
                return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return info
