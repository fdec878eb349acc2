"""Walk over a data set block by block: what verify, preview, stats and export share. One block in memory at a time."""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from xxhash import xxh3_64_intdigest

from shards.encodings import decode
from shards.errors import InputError
from shards.reader import ShardReader
from shards.schema import ImageSpec, Manifest


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


def scan(
    root: Path, manifest: Manifest, columns: Sequence[str], splits: Sequence[str] | None = None
) -> Iterator[Block]:
    """All blocks of all shards of the splits (None: of all) in order, with the named columns.

    Page checksums are verified. The reader of a block is open until the next block is asked for.
    """
    for split in manifest.splits if splits is None else splits:
        for number, info in enumerate(manifest.splits[split]):
            with ShardReader(root, manifest, info) as reader:
                for block in range(reader.blocks):
                    first, end = reader.block_span(block)
                    table = read_block(reader, block, columns)
                    if table.num_rows != end - first:
                        raise InputError(
                            f"shard {info.name}: block {block} has {table.num_rows} rows, not {end - first}"
                        )
                    yield Block(split=split, shard=number, first=first, reader=reader, table=table)


def read_block(reader: ShardReader, block: int, columns: Sequence[str]) -> pa.Table:
    """The named columns of one block, page checksums verified."""
    return reader._read(block, list(columns))


def read_image(reader: ShardReader, *, offset: int, size: int, xxh3: int, key: str) -> bytes:
    """The encoded image of one row. InputError, naming shard and key, where its bytes are not those ingested."""
    image = b""
    if 0 <= offset and 0 < size <= reader.info.tar.bytes - offset:
        image = os.pread(reader.fd, size, offset)
    if xxh3_64_intdigest(image) != xxh3:
        raise InputError(
            f"shard {reader.info.name}, sample {key}, offset {offset:,}: the image's bytes are not those that were "
            "ingested; restore the shard"
        )
    return image


def decode_image(content: bytes, spec: ImageSpec) -> NDArray[np.uint8]:
    """Encoded bytes to (height, width) grey levels. ValueError, saying why, where they are not what the spec says."""
    try:
        if spec.codec != "raw":
            _check_header(content, spec)
        return decode(content, spec)
    except (ValueError, OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"it does not decode as {spec.codec}: {' '.join(str(error).split())[:120]}") from None


_MODES = {1: "L", 3: "RGB"}


def _check_header(content: bytes, spec: ImageSpec) -> None:
    """Size and channels, before any pixel is decoded: a lie about the size costs nothing."""
    with Image.open(io.BytesIO(content)) as image:
        (width, height), mode, codec = image.size, image.mode, image.format
    # WebP knows no grey: it stores three equal channels.
    expected = "RGB" if spec.codec == "webp" else _MODES[spec.channels]
    if (height, width, mode) != (spec.height, spec.width, expected):
        raise ValueError(f"a {codec} of {height} x {width} {mode}, not {spec.height} x {spec.width} {expected}")
