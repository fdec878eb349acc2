"""Read one shard: open and check its trio, hand out the rows of a block. Reading image bytes is the pipeline's work.

Opening checks what can be checked without reading the data: sizes, and the digest of the Parquet footer, which binds
every page's place and length to the manifest. Pages carry checksums, images the xxh3 in their row.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.errors import InputError
from shards.schema import LABEL_PREFIX, MAX_BLOCK_TEXT_BYTES, FileInfo, Manifest, ShardInfo, sample_key
from shards.table import ShardTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of one block, a struct of arrays of length n."""

    source: NDArray[np.uint8]
    """(n,) index of the source."""
    source_row: NDArray[np.int64]
    """(n,) row in the source."""
    offset: NDArray[np.int64]
    """(n,) first byte of the image in the tar."""
    size: NDArray[np.int64]
    """(n,) bytes of the image."""
    xxh3: NDArray[np.uint64]
    """(n,) xxh3-64 of the image's bytes."""
    tokens: NDArray[np.uint16]
    """(n, context) token ids."""
    token_count: NDArray[np.int64]
    """(n,) tokens before the padding."""
    side_words: NDArray[np.bool_]
    """(n,) whether the report names a side."""
    group: NDArray[np.int64]
    """(n,) patient number, NO_GROUP where unknown."""
    labels: NDArray[np.float32]
    """(n, labels) values, NaN for unknown."""

    def __len__(self) -> int:
        return len(self.source_row)

    def keys(self) -> list[str]:
        """The samples' opaque keys."""
        return [sample_key(int(source), int(row)) for source, row in zip(self.source, self.source_row, strict=True)]


TRAINING_COLUMNS = ("source", "row", "offset", "size", "xxh3", "tokens", "token_count", "side_words", "group")


_SAMPLE_BYTES = 64 << 10
"""What a sample has in the tar beside image and report: headers, padding, labels."""


class ShardReader:
    """One open shard. InputError, naming it, where a file is missing or is not the one the manifest describes."""

    def __init__(self, root: Path, manifest: Manifest, info: ShardInfo) -> None:
        self.info = info
        self.manifest = manifest
        self._groups = manifest.groups.get(info.name.rsplit("-", 1)[0])
        check_file(Path(root) / f"{info.name}.idx", info.idx)
        path = Path(root) / f"{info.name}.parquet"
        check_file(path, info.parquet)
        self.path = Path(root) / f"{info.name}.tar"
        check_file(self.path, info.tar)
        try:
            self._table = ShardTable(path, manifest, info)
        except OSError as error:
            raise self._cannot_open(error) from None
        try:
            # Not blocking: the file may have become a pipe since it was checked, whose opening might never end.
            self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            """File descriptor of the tar."""
        except OSError as error:
            self._table.close()
            raise self._cannot_open(error) from None

    @property
    def blocks(self) -> int:
        """Number of blocks in the shard."""
        return -(-self.info.rows // self.manifest.block_rows)

    def block_span(self, block: int) -> tuple[int, int]:
        """First row of a block and the row after its last."""
        first = block * self.manifest.block_rows
        return first, min(first + self.manifest.block_rows, self.info.rows)

    def spans(self, rows: int) -> Iterator[tuple[int, int]]:
        """First block, and how many, of so many rows or more at a time, through the shard."""
        count = -(-rows // self.manifest.block_rows)
        for block in range(0, self.blocks, count):
            yield block, min(count, self.blocks - block)

    def read_rows(self, block: int) -> Rows:
        """The rows of one block, from one Parquet row group, its page checksums verified."""
        columns = [*TRAINING_COLUMNS, *(LABEL_PREFIX + name for name in self.manifest.labels)]
        table = self.read_columns(block, columns)
        rows = Rows(
            source=_values(table, "source"),
            source_row=_values(table, "row"),
            offset=_values(table, "offset"),
            size=_values(table, "size"),
            xxh3=_values(table, "xxh3"),
            tokens=_tokens(table, self.manifest.tokenizer.context),
            token_count=_values(table, "token_count").astype(np.int64),
            side_words=_values(table, "side_words"),
            group=_values(table, "group"),
            labels=_labels(table, self.manifest.labels),
        )
        self._check_rows(block, rows)
        return rows

    def read_text(self, block: int) -> list[str]:
        """The reports of one block."""
        return self.read_columns(block, ["text"])["text"].to_pylist()

    def read_table(self) -> pa.Table:
        """The whole table, every column, page checksums verified."""
        return pa.concat_tables([self.read_columns(block, self._table.names) for block in range(self.blocks)])

    def close(self) -> None:
        """Close both files."""
        os.close(self.fd)
        self._table.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_columns(self, block: int, columns: list[str], count: int = 1) -> pa.Table:
        """The named columns of `count` blocks from one on, page checksums verified, without nulls but in labels.

        Many small blocks at once cost a fraction of as many calls, and as much more memory.
        """
        return self._table.read(block, columns, count)

    def _check_rows(self, block: int, rows: Rows) -> None:
        first, end = self.block_span(block)
        most = min(self.manifest.image.max_bytes, self.info.tar.bytes)
        sized = (rows.size > 0) & (rows.size <= most)
        inside = (rows.offset >= 0) & (rows.offset <= self.info.tar.bytes - rows.size)
        if len(rows) != end - first or not (sized & inside).all():
            raise InputError(f"shard {self.info.name}: block {block} has rows that do not fit its tar; ingest again")
        span = int((rows.offset + rows.size).max() - rows.offset.min())
        if span > int(rows.size.sum()) + MAX_BLOCK_TEXT_BYTES + len(rows) * _SAMPLE_BYTES:
            raise InputError(f"shard {self.info.name}: block {block} is scattered over its tar; ingest again")
        if self._groups and not ((rows.group >= self._groups[0]) & (rows.group < self._groups[1])).all():
            raise InputError(
                f"shard {self.info.name}: block {block} holds a group of another split (leak); ingest again"
            )

    def _cannot_open(self, error: OSError) -> InputError:
        reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
        return InputError(f"shard {self.info.name}: cannot open it ({reason}); restore its files")


def check_file(path: Path, expected: FileInfo) -> None:
    """InputError where a file of a shard is missing or has another size than the manifest says."""
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"shard {path.stem}: cannot read {path.name} ({error.strerror}); restore it") from None
    if not S_ISREG(stat.st_mode):
        raise InputError(f"shard {path.stem}: {path.name} is not a regular file; restore it")
    size = stat.st_size
    if size != expected.bytes:
        raise InputError(
            f"shard {path.stem}: {path.name} has {size:,} bytes, the manifest says {expected.bytes:,}: "
            "it changed after ingest; restore it or ingest again"
        )


def _values(table: pa.Table, name: str) -> NDArray:
    """A column of numbers or of yes and no, NaN for blanks. `to_numpy` would import pandas: 0.4 s and 28 MiB."""
    column = table[name].combine_chunks()
    if pa.types.is_boolean(column.type):
        return np.from_dlpack(column.cast(pa.uint8())).view(bool)
    return np.from_dlpack(pc.fill_null(column, np.nan) if column.null_count else column)


def _tokens(table: pa.Table, context: int) -> NDArray[np.uint16]:
    tokens = np.from_dlpack(table["tokens"].combine_chunks().flatten())
    return np.asarray(tokens, dtype=np.uint16).reshape(-1, context)


def _labels(table: pa.Table, names: tuple[str, ...]) -> NDArray[np.float32]:
    if not names:
        return np.empty((table.num_rows, 0), dtype=np.float32)
    return np.stack([_values(table, LABEL_PREFIX + name) for name in names], axis=1)
