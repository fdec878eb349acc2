"""Walk over a data set block by block: what verify, preview, stats and export share. One block in memory at a time."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from shards.errors import InputError
from shards.reader import ShardReader
from shards.schema import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Some columns of one block, and the open shard it belongs to."""

    split: str
    shard: int
    """Number of the shard in its split."""
    first: int
    """Row of the shard at which the block begins."""
    reader: ShardReader
    table: pa.Table
    """One row a sample."""


def scan(root: Path, manifest: Manifest, columns: Sequence[str], *, rows: int = 1) -> Iterator[Block]:
    """All blocks of all shards in order, with the named columns; several blocks as one up to `rows` rows or more.

    Page checksums are verified. The reader of a block is open until the next block is asked for.
    """
    for split in manifest.splits:
        for number, info in enumerate(manifest.splits[split]):
            with ShardReader(root, manifest, info) as reader:
                for block, count in reader.spans(rows):
                    table = reader.read_columns(block, list(columns), count)
                    first = reader.block_span(block)[0]
                    yield Block(split=split, shard=number, first=first, reader=reader, table=table)


def read_samples(
    root: Path, manifest: Manifest, split: str, rows: NDArray[np.int64], columns: Sequence[str]
) -> Iterator[tuple[ShardReader, dict[str, Any]]]:
    """The samples at these rows of a split, ascending: the open shard and the named columns of each.

    A shard is opened once, a block read once, and neither where none of the rows lie in it.
    """
    first = 0
    for info in manifest.splits[split]:
        low, high = np.searchsorted(rows, [first, first + info.rows])
        if low < high:
            with ShardReader(root, manifest, info) as reader:
                for row in _read_rows(reader, rows[low:high] - first, manifest.block_rows, columns):
                    yield reader, row
        first += info.rows


def _read_rows(
    reader: ShardReader, rows: NDArray[np.int64], block_rows: int, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    blocks, starts = np.unique(rows // block_rows, return_index=True)
    for block, mine in zip(blocks, np.split(rows, starts[1:]), strict=True):
        table = reader.read_columns(int(block), list(columns))
        yield from table.take(mine - block * block_rows).to_pylist()


def read_image(reader: ShardReader, row: Mapping[str, Any]) -> bytes:
    """The encoded image of a row, from its `key`, `offset`, `size` and `xxh3`.

    InputError, naming shard and key, where its bytes are not those that were ingested.
    """
    offset, size = row["offset"], row["size"]
    image = b""
    if 0 <= offset and 0 < size <= min(reader.info.tar.bytes - offset, reader.manifest.image.max_bytes):
        image = os.pread(reader.fd, size, offset)
    if xxh3_64_intdigest(image) != row["xxh3"]:
        raise InputError(
            f"shard {reader.info.name}, sample {row['key']}, offset {offset:,}: the image's bytes are not those "
            "that were ingested; restore the shard"
        )
    return image
