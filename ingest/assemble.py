"""Phase two: one shard at a time from the spills, in the order of the global shuffle. Runs in worker processes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ingest.encode import Spills
from shards.atomic import write_atomic
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
    """First row of each spill, all sources counted through."""
    image: ImageSpec
    labels: tuple[str, ...]
    block_rows: int
    group_range: tuple[int, int] | None
    rows: NDArray[np.int64]
    """(n,) rows, all sources counted through."""
    sources: NDArray[np.int64]
    """(n,) source of each row."""
    source_rows: NDArray[np.int64]
    """(n,) row in the source."""
    texts: list[str]
    tokens: NDArray[np.uint16]
    """(n, context)"""
    token_counts: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    side_words: NDArray[np.bool_]
    groups: NDArray[np.int64]
    values: NDArray[np.float32]
    """(n, labels), NaN for unknown."""


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
        context=task.tokens.shape[1],
        labels=task.labels,
        block_rows=task.block_rows,
        groups=task.group_range,
    )
    spills = Spills(task.work, task.starts)
    with writer:
        for number in range(len(task.rows)):
            writer.add(_sample(task, spills, number))
    spills.close()
    write_atomic(note, json.dumps(asdict(writer.info)).encode())
    return writer.info


def _sample(task: AssembleTask, spills: Spills, number: int) -> Sample:
    return Sample(
        source=int(task.sources[number]),
        row=int(task.source_rows[number]),
        image=spills.image(int(task.rows[number])),
        text=task.texts[number],
        tokens=task.tokens[number],
        token_count=int(task.token_counts[number]),
        truncated=bool(task.truncated[number]),
        side_words=bool(task.side_words[number]),
        group=int(task.groups[number]),
        labels=tuple(None if np.isnan(value) else float(value) for value in task.values[number]),
    )


def _read_note(note: Path, folder: Path) -> ShardInfo | None:
    """The shard that a note describes, if its files are there in the sizes noted."""
    try:
        fields = json.loads(note.read_bytes())
        files = {kind: FileInfo(**fields[kind]) for kind in ("tar", "idx", "parquet")}
        info = ShardInfo(**fields | files)
        for kind, expected in files.items():
            check_file(folder / f"{info.name}.{kind}", expected)
    except (OSError, ValueError):
        return None
    return info
