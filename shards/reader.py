"""Read one shard: open and check its trio, hand out the rows of a block. Reading image bytes is the pipeline's work.

Opening checks what can be checked without reading the data: sizes, and the digest of the Parquet footer, which binds
every page's place and length to the manifest. Pages carry checksums, images the xxh3 in their row.
"""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from shards.errors import InputError
from shards.pages import unpacked_bytes
from shards.partial import PartialFile
from shards.schema import LABEL_PREFIX, MAX_BLOCK_TEXT_BYTES, FileInfo, Manifest, ShardInfo, sample_key, table_schema


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


_MAX_FOOTER_BYTES = 32 << 20
"""A footer takes about 100 bytes a column and block."""
_ENCODINGS = frozenset({"PLAIN", "RLE"})
"""Of columns and of which values are there. Dictionaries and deltas let a small file hold any amount of text."""
_SLACK_BYTES = 4096
"""Page headers and the like in a column of a block."""
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
            self._file = PartialFile(path, info.parquet.bytes)
            self._parquet = _open_table(self._file, path, manifest, info)
            # Not blocking: the file may have become a pipe since it was checked, whose opening might never end.
            self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            """File descriptor of the tar."""
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
            raise InputError(f"shard {info.name}: cannot open it ({reason}); restore its files") from None
        self._checked: set[tuple[int, str]] = set()
        self._lock = threading.Lock()
        """One thread at a time is at the table; any number may wait for the disk."""

    @property
    def blocks(self) -> int:
        """Number of blocks in the shard."""
        return -(-self.info.rows // self.manifest.block_rows)

    def block_span(self, block: int) -> tuple[int, int]:
        """First row of a block and the row after its last."""
        first = block * self.manifest.block_rows
        return first, min(first + self.manifest.block_rows, self.info.rows)

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
        names = self._parquet.schema_arrow.names
        return pa.concat_tables([self.read_columns(block, names) for block in range(self.blocks)])

    def close(self) -> None:
        """Close both files."""
        os.close(self.fd)
        self._parquet.close(force=True)
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read_columns(self, block: int, columns: list[str], count: int = 1) -> pa.Table:
        """The named columns of `count` blocks from one on, page checksums verified, without nulls but in labels.

        Many small blocks at once cost a fraction of as many calls, and as much more memory.
        """
        blocks = range(block, block + count)
        chunks = [chunk for each in blocks for chunk in self._chunks(each, columns)]
        try:
            parts = self._file.read((chunk.data_page_offset, _end(chunk)) for _, _, chunk in chunks)
            with self._lock, self._file.holding(parts):
                for each, name, chunk in chunks:
                    self._check_pages(each, name, chunk)
                table = self._parquet.read_row_groups(list(blocks), columns=columns, use_threads=False)
        except (OSError, EOFError, MemoryError, pa.ArrowException) as error:
            raise self._damaged(f"block {block}", error) from None
        self._check_values(block, table)
        return table

    def _check_values(self, block: int, table: pa.Table) -> None:
        """InputError for values that no writer of ours makes and that would trip whoever takes them for granted."""
        try:
            table.validate(full=True)
        except pa.ArrowException:
            raise self._senseless(block, "some text is not UTF-8") from None
        for name in table.column_names:
            column = table[name]
            holes = column.null_count or (name == "tokens" and any(part.flatten().null_count for part in column.chunks))
            if holes and not name.startswith(LABEL_PREFIX):
                raise self._senseless(block, f"column {name!r} has blanks")
        if "source" in table.column_names and pc.max(table["source"]).as_py() >= len(self.manifest.sources):
            raise self._senseless(block, "it names a source that the manifest does not")

    def _chunks(self, block: int, columns: list[str]) -> Iterator[tuple[int, str, pq.ColumnChunkMetaData]]:
        """What the footer says of a block's columns. InputError where our writer makes no such thing."""
        group = self._parquet.metadata.row_group(block)
        first, end = self.block_span(block)
        if group.num_rows != end - first:
            raise self._senseless(block, f"it has {group.num_rows:,} rows, not {end - first:,}")
        for chunk in map(group.column, range(group.num_columns)):
            name = chunk.path_in_schema.removesuffix(".list.element")
            if name not in columns:
                continue
            if chunk.has_dictionary_page or chunk.compression != "ZSTD" or not _ENCODINGS.issuperset(chunk.encodings):
                raise self._senseless(block, f"column {name!r} is encoded another way than ours")
            if not 0 <= chunk.data_page_offset <= _end(chunk) <= self.info.parquet.bytes:
                raise self._senseless(block, f"column {name!r} lies outside the file")
            if max(chunk.total_compressed_size, chunk.total_uncompressed_size) > self._most_bytes(name, block):
                raise self._senseless(block, f"column {name!r} would take {chunk.total_uncompressed_size:,} bytes")
            yield block, name, chunk

    def _check_pages(self, block: int, name: str, chunk: pq.ColumnChunkMetaData) -> None:
        """InputError where a column is not what our writer makes, seen before any of it is unpacked."""
        if (block, name) in self._checked:
            return
        try:
            size = unpacked_bytes(self._file.held, chunk.data_page_offset, chunk.total_compressed_size)
        except (ValueError, KeyError, TypeError, OSError, OverflowError) as error:
            raise self._damaged(f"block {block}", error) from None
        if size > self._most_bytes(name, block):
            raise self._senseless(block, f"column {name!r} would take {size:,} bytes")
        self._checked.add((block, name))

    def _most_bytes(self, name: str, block: int) -> int:
        """More than our writer makes of a column of one block, unpacked or not."""
        if name == "text":
            return MAX_BLOCK_TEXT_BYTES + _SLACK_BYTES
        first, end = self.block_span(block)
        # Parquet knows no 16 bits: a token takes 4 bytes, and its place in the list some bits more.
        return (end - first) * (5 * self.manifest.tokenizer.context if name == "tokens" else 32) + _SLACK_BYTES

    def _senseless(self, block: int, why: str) -> InputError:
        return InputError(f"shard {self.info.name}: block {block} of its table makes no sense: {why}; ingest again")

    def _damaged(self, what: str, error: Exception) -> InputError:
        reason = " ".join(str(error).split())[:120]
        return InputError(
            f"shard {self.info.name}: {what} of its Parquet file cannot be read ({reason}); restore the file"
        )

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


def _end(chunk: pq.ColumnChunkMetaData) -> int:
    return chunk.data_page_offset + chunk.total_compressed_size


def _read_footer(file: PartialFile, path: Path, info: ShardInfo) -> list[tuple[int, bytes]]:
    if info.footer_bytes > _MAX_FOOTER_BYTES:
        raise InputError(f"shard {info.name}: a Parquet footer of {info.footer_bytes:,} bytes is none of ours")
    parts = file.read([(max(info.parquet.bytes - info.footer_bytes, 0), info.parquet.bytes)])
    if xxh3_128_hexdigest(b"".join(content for _, content in parts)) != info.footer_xxh3:
        raise InputError(
            f"shard {info.name}: the footer of {path.name} changed after ingest; restore it or ingest again"
        )
    return parts


def _open_table(file: PartialFile, path: Path, manifest: Manifest, info: ShardInfo) -> pq.ParquetFile:
    try:
        with file.holding(_read_footer(file, path, info)):
            table = pq.ParquetFile(pa.BufferReader(file.buffer), page_checksum_verification=True)
    except (EOFError, pa.ArrowException) as error:
        raise InputError(f"shard {info.name}: {path.name} is not a Parquet file ({error})") from None
    expected = table_schema(manifest.tokenizer.context, manifest.labels)
    blocks = -(-info.rows // manifest.block_rows)
    counts = (table.metadata.num_rows, table.metadata.num_row_groups)
    if not table.schema_arrow.equals(expected) or counts != (info.rows, blocks):
        raise InputError(
            f"shard {info.name}: {path.name} has other columns or rows than the manifest says; ingest again"
        )
    return table


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
