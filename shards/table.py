"""The table of one shard: its Parquet file, read a block at a time and believed as far as it was checked.

Opening reads the footer, whose digest binds every page's place and length to the manifest; each read checks the pages'
checksums. Sizes are checked before anything is unpacked: a set may come from anywhere, and be made to fill the memory.

pyarrow reads a row group column by column, page header by page header. On a file system that takes milliseconds to
answer, one read of all that is wanted, and pyarrow on memory, takes a tenth of the time. The memory is anonymous: no
file is mapped, so that one that shrinks is an error and no SIGBUS, and pages that nothing was read into cost nothing.
"""

import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from xxhash import xxh3_128_hexdigest

from shards.errors import InputError
from shards.pages import unpacked_bytes
from shards.schema import LABEL_PREFIX, MAX_BLOCK_TEXT_BYTES, Manifest, ShardInfo, table_schema

_MAX_FOOTER_BYTES = 32 << 20
"""A footer takes about 100 bytes a column and block."""
_ENCODINGS = frozenset({"PLAIN", "RLE"})
"""Of columns and of which values are there. Dictionaries and deltas let a small file hold any amount of text."""
_SLACK_BYTES = 4096
"""Page headers and the like in a column of a block."""

Span = tuple[int, int]
"""First byte, and the byte after the last."""
_GAP = 256 << 10
"""Bytes between two spans below which they are read as one: less than a request to a far disk costs."""


class PartialFile:
    """An open file of which what is asked for is in memory, at its place.

    Not locked: `holding` is for one thread at a time, `read` for any.
    """

    def __init__(self, path: Path, size: int) -> None:
        """`size`: bytes of the file. OSError where it cannot be opened."""
        self._memory = mmap.mmap(-1, max(size, 1))
        # Not blocking: the file may have become a pipe since it was checked, whose opening might never end.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.buffer = pa.py_buffer(self._memory)
        """As long as the file; zeros but for what is held."""

    def read(self, spans: Iterable[Span]) -> list[tuple[int, bytes]]:
        """The bytes of spans, near ones together, each with its place. OSError, or EOFError where the file ends."""
        return [(start, self._read(start, end)) for start, end in _together(spans)]

    @contextmanager
    def holding(self, parts: list[tuple[int, bytes]]) -> Iterator[None]:
        """Inside the block, what was read is in `buffer`."""
        try:
            for start, content in parts:
                self._memory[start : start + len(content)] = content
            yield
        finally:
            self._memory.madvise(mmap.MADV_DONTNEED)

    def held(self, size: int, offset: int) -> bytes:
        """Bytes of what is held."""
        return self._memory[offset : offset + size]

    def close(self) -> None:
        """Close the file; the memory goes when pyarrow lets go of it."""
        os.close(self._fd)

    def _read(self, start: int, end: int) -> bytes:
        pieces = []
        while start < end:
            piece = os.pread(self._fd, end - start, start)
            if not piece:
                raise EOFError(f"it ends at byte {start:,}")
            pieces.append(piece)
            start += len(piece)
        return b"".join(pieces)


def _together(spans: Iterable[Span]) -> Iterator[Span]:
    """Spans in order of place, those with less than _GAP between them as one."""
    start = end = -1
    for first, last in sorted(spans):
        if start >= 0 and first - end <= _GAP:
            end = max(end, last)
            continue
        if start >= 0:
            yield start, end
        start, end = first, last
    if start >= 0:
        yield start, end


class ShardTable:
    """One open table. Any number of threads may read."""

    def __init__(self, path: Path, manifest: Manifest, info: ShardInfo) -> None:
        """InputError for a table that is not the manifest's; OSError where the file cannot be read."""
        self._manifest, self._info = manifest, info
        self._file = PartialFile(path, info.parquet.bytes)
        try:
            self._parquet = _open_table(self._file, path, manifest, info)
        except BaseException:
            self._file.close()
            raise
        self._checked: set[tuple[int, str]] = set()
        self._lock = threading.Lock()
        """One thread at a time is at the table; any number may wait for the disk."""

    @property
    def names(self) -> list[str]:
        """Of its columns."""
        return self._parquet.schema_arrow.names

    def close(self) -> None:
        """Close the file."""
        self._parquet.close(force=True)
        self._file.close()

    def read(self, block: int, columns: list[str], count: int = 1) -> pa.Table:
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
        if "source" in table.column_names and pc.max(table["source"]).as_py() >= len(self._manifest.sources):
            raise self._senseless(block, "it names a source that the manifest does not")

    def _chunks(self, block: int, columns: list[str]) -> Iterator[tuple[int, str, pq.ColumnChunkMetaData]]:
        """What the footer says of a block's columns. InputError where our writer makes no such thing."""
        group = self._parquet.metadata.row_group(block)
        if group.num_rows != self._rows(block):
            raise self._senseless(block, f"it has {group.num_rows:,} rows, not {self._rows(block):,}")
        for chunk in map(group.column, range(group.num_columns)):
            name = chunk.path_in_schema.removesuffix(".list.element")
            if name not in columns:
                continue
            if chunk.has_dictionary_page or chunk.compression != "ZSTD" or not _ENCODINGS.issuperset(chunk.encodings):
                raise self._senseless(block, f"column {name!r} is encoded another way than ours")
            if not 0 <= chunk.data_page_offset <= _end(chunk) <= self._info.parquet.bytes:
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

    def _rows(self, block: int) -> int:
        first = block * self._manifest.block_rows
        return min(self._manifest.block_rows, self._info.rows - first)

    def _most_bytes(self, name: str, block: int) -> int:
        """More than our writer makes of a column of one block, unpacked or not."""
        if name == "text":
            return MAX_BLOCK_TEXT_BYTES + _SLACK_BYTES
        rows = self._rows(block)
        # Parquet knows no 16 bits: a token takes 4 bytes, and its place in the list some bits more.
        return rows * (5 * self._manifest.tokenizer.context if name == "tokens" else 32) + _SLACK_BYTES

    def _senseless(self, block: int, why: str) -> InputError:
        return InputError(f"shard {self._info.name}: block {block} of its table makes no sense: {why}; ingest again")

    def _damaged(self, what: str, error: Exception) -> InputError:
        reason = " ".join(str(error).split())[:120]
        return InputError(
            f"shard {self._info.name}: {what} of its Parquet file cannot be read ({reason}); restore the file"
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
