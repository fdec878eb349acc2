"""Read one shard: open and check its trio, hand out the rows of a block. Reading image bytes is the pipeline's work.

Opening checks what can be checked without reading the data: sizes, and the digest of the Parquet footer, which binds
every page's place and length to the manifest. Pages carry checksums, images the xxh3 in their row.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from shards.errors import InputError
from shards.schema import LABEL_PREFIX, FileInfo, Manifest, ShardInfo, sample_key, table_schema


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


class ShardReader:
    """One open shard. InputError, naming it, where a file is missing or is not the one the manifest describes."""

    def __init__(self, root: Path, manifest: Manifest, info: ShardInfo) -> None:
        self.info = info
        self._manifest = manifest
        self._groups = manifest.groups.get(info.name.rsplit("-", 1)[0])
        check_file(Path(root) / f"{info.name}.idx", info.idx)
        path = Path(root) / f"{info.name}.parquet"
        check_file(path, info.parquet)
        _check_footer(path, info)
        self.path = Path(root) / f"{info.name}.tar"
        check_file(self.path, info.tar)
        self._parquet = _open_table(path, manifest, info)
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        """File descriptor of the tar."""

    @property
    def blocks(self) -> int:
        """Number of blocks in the shard."""
        return -(-self.info.rows // self._manifest.block_rows)

    def block_span(self, block: int) -> tuple[int, int]:
        """First row of a block and the row after its last."""
        first = block * self._manifest.block_rows
        return first, min(first + self._manifest.block_rows, self.info.rows)

    def read_rows(self, block: int) -> Rows:
        """The rows of one block, from one Parquet row group, its page checksums verified."""
        columns = [*TRAINING_COLUMNS, *(LABEL_PREFIX + name for name in self._manifest.labels)]
        table = self.read_columns(block, columns)
        rows = Rows(
            source=table["source"].to_numpy(),
            source_row=table["row"].to_numpy(),
            offset=table["offset"].to_numpy(),
            size=table["size"].to_numpy(),
            xxh3=table["xxh3"].to_numpy(),
            tokens=_tokens(table, self._manifest.tokenizer.context),
            token_count=table["token_count"].to_numpy().astype(np.int64),
            side_words=table["side_words"].to_numpy(),
            group=table["group"].to_numpy(),
            labels=_labels(table, self._manifest.labels),
        )
        self._check_rows(block, rows)
        return rows

    def read_text(self, block: int) -> list[str]:
        """The reports of one block."""
        return self.read_columns(block, ["text"])["text"].to_pylist()

    def read_table(self) -> pa.Table:
        """The whole table, every column, page checksums verified."""
        try:
            return self._parquet.read(use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged("table", error) from None

    def close(self) -> None:
        """Close both files."""
        os.close(self.fd)
        self._parquet.close(force=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read_columns(self, block: int, columns: list[str]) -> pa.Table:
        """The named columns of one block, page checksums verified."""
        try:
            return self._parquet.read_row_group(block, columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(f"block {block}", error) from None

    def _damaged(self, what: str, error: Exception) -> InputError:
        reason = " ".join(str(error).split())[:120]
        return InputError(
            f"shard {self.info.name}: {what} of its Parquet file cannot be read ({reason}); restore the file"
        )

    def _check_rows(self, block: int, rows: Rows) -> None:
        first, end = self.block_span(block)
        inside = (rows.offset >= 0) & (rows.size > 0) & (rows.offset + rows.size <= self.info.tar.bytes)
        if len(rows) != end - first or not inside.all():
            raise InputError(f"shard {self.info.name}: block {block} has rows that do not fit its tar; ingest again")
        if self._groups and not ((rows.group >= self._groups[0]) & (rows.group < self._groups[1])).all():
            raise InputError(
                f"shard {self.info.name}: block {block} holds a group of another split (leak); ingest again"
            )


def check_file(path: Path, expected: FileInfo) -> None:
    """InputError where a file of a shard is missing or has another size than the manifest says."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"shard {path.stem}: cannot read {path.name} ({error.strerror}); restore it") from None
    if size != expected.bytes:
        raise InputError(
            f"shard {path.stem}: {path.name} has {size:,} bytes, the manifest says {expected.bytes:,}: "
            "it changed after ingest; restore it or ingest again"
        )


def _check_footer(path: Path, info: ShardInfo) -> None:
    with open(path, "rb") as file:
        file.seek(-min(info.footer_bytes, info.parquet.bytes), os.SEEK_END)
        footer = file.read()
    if xxh3_128_hexdigest(footer) != info.footer_xxh3:
        raise InputError(
            f"shard {info.name}: the footer of {path.name} changed after ingest; restore it or ingest again"
        )


def _open_table(path: Path, manifest: Manifest, info: ShardInfo) -> pq.ParquetFile:
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"shard {info.name}: {path.name} is not a Parquet file ({error})") from None
    expected = table_schema(manifest.tokenizer.context, manifest.labels)
    if not table.schema_arrow.equals(expected) or table.metadata.num_rows != info.rows:
        raise InputError(
            f"shard {info.name}: {path.name} has other columns or rows than the manifest says; ingest again"
        )
    return table


def _tokens(table: pa.Table, context: int) -> NDArray[np.uint16]:
    chunk = table["tokens"].combine_chunks()
    return chunk.flatten().to_numpy().reshape(-1, context)


def _labels(table: pa.Table, names: tuple[str, ...]) -> NDArray[np.float32]:
    if not names:
        return np.empty((table.num_rows, 0), dtype=np.float32)
    # to_numpy turns nulls of a float column into NaN, which is what unknown means in a batch.
    return np.stack([table[LABEL_PREFIX + name].to_numpy() for name in names], axis=1).astype(np.float32)
