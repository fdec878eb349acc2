"""Write one shard: tar, index and table together, all three complete or none under its final name.

The tar streams to disk while its digest runs along; index and table are built from the same offsets at the end.
"""

import io
import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from shards import tar
from shards.atomic import write_atomic
from shards.digest import HashingFile
from shards.errors import InputError
from shards.index import Member, encode_index, index_line
from shards.schema import (
    MAX_BLOCK_TEXT_BYTES,
    NO_GROUP,
    FileInfo,
    ImageSpec,
    Manifest,
    ShardInfo,
    sample_key,
    table_schema,
)
from shards.stream import atomic_stream

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
_TABLE_ROWS = 1024
"""About as many rows are held as Python objects, 2.7 KB each."""


class Sample(NamedTuple):
    """What the writer takes for one sample."""

    source: int
    """Index of the source, 0 to 99."""
    row: int
    """Row in the source."""
    image: bytes | memoryview
    """Encoded as the image spec says."""
    text: str
    """The report, kept exactly."""
    tokens: NDArray[np.uint16]
    """(context,) token ids, zero-padded."""
    token_count: int
    """Tokens before the padding, start and end included."""
    truncated: bool
    """Whether the report had more tokens than the context holds."""
    side_words: bool
    """Whether the report names a side, left or right."""
    group: int = NO_GROUP
    """Number of the patient, or NO_GROUP."""
    labels: tuple[float | None, ...] = ()
    """One value a label column; None for unknown."""


def sample_json(labels: dict[str, float | None], row: int, source: int) -> bytes:
    """Content of KEY.json: labels (null for unknown), source, row. Sorted keys, no spaces, UTF-8."""
    known = _ENCODER.encode(labels) if labels else "{}"
    return f'{{"labels":{known},"row":{row},"source":{source}}}'.encode()


def text_bytes(text: str) -> bytes:
    """Content of KEY.txt."""
    return text.encode()


class ShardWriter:
    """Context manager that writes the trio of one shard; `info` is there after a clean exit.

    An error inside the block, or a shard without samples, leaves nothing under a final name.
    """

    info: ShardInfo

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        image: ImageSpec,
        context: int,
        labels: tuple[str, ...],
        block_rows: int,
        groups: tuple[int, int] | None = None,
    ) -> None:
        """`groups` is the half-open range of group numbers that this shard's split owns; None where there are none."""
        self._folder, self._name = Path(folder), name
        self._extension, self._labels, self._block_rows, self._groups = image.extension, labels, block_rows, groups
        self._schema = table_schema(context, labels)
        self._context = context
        self._rows: list[tuple] = []
        self._tables: list[pa.Table] = []
        self._table_rows = block_rows * -(-_TABLE_ROWS // block_rows)
        self._lines: list[str] = []
        self._stack = ExitStack()
        self._text_bytes = 0

    @classmethod
    def of(cls, manifest: Manifest, folder: Path, name: str) -> Self:
        """For a shard of the set that a manifest describes."""
        return cls(
            folder,
            name,
            image=manifest.image,
            context=manifest.tokenizer.context,
            labels=manifest.labels,
            block_rows=manifest.block_rows,
            groups=manifest.groups.get(name.split("-")[0]),
        )

    def __enter__(self) -> Self:
        self._tar = HashingFile(self._stack.enter_context(atomic_stream(self._folder / f"{self._name}.tar")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self.info = self._finish()

    def add(self, sample: Sample) -> None:
        """Append one sample: three adjacent members and a table row."""
        self._check(sample)
        key = sample_key(sample.source, sample.row)
        text = text_bytes(sample.text)
        self._count_text(len(text))
        record = sample_json(dict(zip(self._labels, sample.labels, strict=True)), sample.row, sample.source)
        image = self._write_members(key, {self._extension: sample.image, "txt": text, "json": record})
        # In the order of the schema's fields.
        self._rows.append(
            (
                key,
                sample.source,
                sample.row,
                image.offset,
                image.size,
                xxh3_64_intdigest(sample.image),
                sample.text,
                sample.tokens,
                sample.token_count,
                sample.truncated,
                sample.side_words,
                sample.group,
                *sample.labels,
            )
        )
        if len(self._lines) % self._table_rows == 0:
            self._pack()

    def _check(self, sample: Sample) -> None:
        if sample.tokens.shape != (self._context,) or sample.tokens.dtype != np.uint16:
            raise ValueError(f"tokens {sample.tokens.dtype}{sample.tokens.shape} are not uint16({self._context},)")
        if self._groups is not None and not self._groups[0] <= sample.group < self._groups[1]:
            raise ValueError(f"group {sample.group} lies outside {self._groups}, the groups of this split: a leak")

    def _count_text(self, size: int) -> None:
        """InputError where the reports of a block become more than a reader takes."""
        if len(self._lines) % self._block_rows == 0:
            self._text_bytes = 0
        self._text_bytes += size
        if self._text_bytes > MAX_BLOCK_TEXT_BYTES:
            raise InputError(
                f"shard {self._name}: the reports of {self._block_rows} rows take more than "
                f"{MAX_BLOCK_TEXT_BYTES:,} bytes; is it the right column?"
            )

    def _write_members(self, key: str, contents: dict[str, bytes | memoryview]) -> Member:
        """Write a sample's members at once and note where each lies; returns the first, the image."""
        members: list[Member] = []
        pieces: list[bytes | memoryview] = []
        at = self._tar.written
        for extension, content in contents.items():
            size = len(content)
            member = Member(extension, at + tar.BLOCK, size, f"{key}.{extension}")
            members.append(member)
            pieces += tar.pieces(member.name, content)
            at += tar.BLOCK + -(-size // tar.BLOCK) * tar.BLOCK
        self._tar.write(b"".join(pieces))
        self._lines.append(index_line(members))
        return members[0]

    def _finish(self) -> ShardInfo:
        if not self._lines:
            raise ValueError(f"shard {self._name} has no samples")
        self._tar.write(tar.END)
        index = encode_index(self._lines)
        if self._rows:
            self._pack()
        table = encode_table(pa.concat_tables(self._tables), self._block_rows)
        footer = table[-footer_size(table) :]
        write_atomic(self._folder / f"{self._name}.idx", index)
        write_atomic(self._folder / f"{self._name}.parquet", table)
        return ShardInfo(
            name=self._name,
            rows=len(self._lines),
            tar=FileInfo(bytes=self._tar.written, xxh3=self._tar.digest.hex()),
            idx=FileInfo(bytes=len(index), xxh3=xxh3_128_hexdigest(index)),
            parquet=FileInfo(bytes=len(table), xxh3=xxh3_128_hexdigest(table)),
            footer_bytes=len(footer),
            footer_xxh3=xxh3_128_hexdigest(footer),
        )

    def _pack(self) -> None:
        """Rows of whole blocks from tuples to Arrow, an eighth of the memory."""
        columns = dict(zip(self._schema.names, zip(*self._rows, strict=True), strict=True))
        self._rows = []
        tokens = pa.array(np.concatenate(columns.pop("tokens")))
        arrays = {name: pa.array(values, type=self._schema.field(name).type) for name, values in columns.items()}
        arrays["tokens"] = pa.FixedSizeListArray.from_arrays(tokens, self._context)
        self._tables.append(pa.table([arrays[name] for name in self._schema.names], schema=self._schema))


def encode_table(table: pa.Table, block_rows: int) -> bytes:
    """The Parquet file: a row group a block, checksummed pages, no statistics (they would copy texts to the footer)."""
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        row_group_size=block_rows,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    return sink.getvalue()


def footer_size(parquet_end: bytes) -> int:
    """Bytes of a Parquet file's footer with its length word and magic, from the file's last 8 bytes or more."""
    return int.from_bytes(parquet_end[-8:-4], "little") + 8
