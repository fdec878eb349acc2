"""Phase two: one shard at a time from the spills, in the order of the global shuffle. Runs in worker processes."""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ingest.encode import SpillReader
from ingest.rows import RowReader
from shards.atomic import write_atomic
from shards.digest import file_digest
from shards.reader import check_file
from shards.schema import FileInfo, ImageSpec, ShardInfo
from shards.writer import Sample, ShardWriter


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
    image: ImageSpec
    context: int
    labels: tuple[str, ...]
    block_rows: int
    group_range: tuple[int, int] | None
    rows: NDArray[np.int64]
    """(n,) rows, all sources counted through."""
    sources: NDArray[np.int64]
    """(n,) source of each row."""
    source_rows: NDArray[np.int64]
    """(n,) row in the source."""
    offsets: NDArray[np.int64]
    """(n,) where the image lies in its spill."""
    sizes: NDArray[np.int32]
    """(n,) bytes of the image."""
    hashes: NDArray[np.uint64]
    """(n,) xxh3-64 of the image."""


def assemble_shard(task: AssembleTask) -> ShardInfo:
    """Write one shard and a note that it is finished; a shard that has its note and its files is kept."""
    note = task.work / f"{task.name}.json"
    finished = _read_note(note, task.folder)
    if finished:
        return finished
    writer = ShardWriter(
        task.folder,
        task.name,
        image=task.image,
        context=task.context,
        labels=task.labels,
        block_rows=task.block_rows,
        groups=task.group_range,
    )
    with contextlib.closing(SpillReader(task.work, task.starts)) as spills, RowReader(task.work) as rows, writer:
        for number, row in enumerate(task.rows.tolist()):
            place = (int(column[number]) for column in (task.offsets, task.sizes, task.hashes))
            image = spills.image(row, *place)
            writer.add(_sample(task, number, image, *rows.read(row)))
    write_atomic(note, json.dumps(asdict(writer.info)).encode())
    return writer.info


def _sample(task: AssembleTask, number: int, image: bytes, record: np.void, text: str) -> Sample:
    return Sample(
        source=int(task.sources[number]),
        row=int(task.source_rows[number]),
        image=image,
        text=text,
        tokens=record["tokens"],
        token_count=int(record["token_count"]),
        truncated=bool(record["truncated"]),
        side_words=bool(record["side_words"]),
        group=int(record["group"]),
        labels=tuple(None if value != value else value for value in record["labels"].tolist()),  # NaN is not itself
    )


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
