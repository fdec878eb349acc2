"""The check of one shard: tar, index and table against each other and against the manifest, block by block.

A tar is not parsed: its bytes are made anew from the table and compared as they stream by, once, while their digest
runs along; so nothing can hide in a header, in padding, or between members.
"""

from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128

from shards import tar
from shards.counter import permutation
from shards.digest import file_digest
from shards.encodings import decode_image
from shards.errors import InputError
from shards.index import VERSION, Member, index_line
from shards.reader import ShardReader
from shards.schema import LABEL_PREFIX, FileInfo, Manifest, ShardInfo, sample_key, table_schema
from shards.writer import sample_json, text_bytes

_SEED = 0
"""Which images of a shard are decoded: the same ones every time."""

Decode = int | Literal["all"]
"""How many images of a shard to decode."""

_NOT_IN_TAR = ["tokens", "token_count", "truncated", "side_words", "group"]
"""Columns that the tar says nothing about."""


class Audit:
    """The check of one shard. What it saw stays readable after a failed `run`."""

    def __init__(self, root: Path, manifest: Manifest, info: ShardInfo, decode: Decode) -> None:
        self._root, self._manifest, self._info = root, manifest, info
        self._count = info.rows if decode == "all" else decode
        self._decode: frozenset[int] = frozenset()
        self._digest = xxh3_128()
        self.sources: list[NDArray[np.uint8]] = []
        self.rows: list[NDArray[np.int64]] = []
        self.groups: list[NDArray[np.int64]] = []

    def run(self) -> None:
        """InputError at the first thing that is wrong."""
        info = self._info
        _check_digest(self._root / f"{info.name}.parquet", info, info.parquet)
        _check_digest(self._root / f"{info.name}.idx", info, info.idx)
        columns = table_schema(self._manifest.tokenizer.context, self._manifest.labels).names
        with (
            ShardReader(self._root, self._manifest, info) as reader,
            open(self._root / f"{info.name}.tar", "rb") as file,
            open(self._root / f"{info.name}.idx", "rb") as index,
        ):
            # Not sooner: by now the table has confirmed how many rows there are.
            self._decode = frozenset(permutation(info.rows, _SEED, int(info.name[-6:]))[: self._count].tolist())
            self._expect(index, f"{VERSION} {info.rows}\n".encode())
            for block in range(reader.blocks):
                table = reader.read_columns(block, columns)
                rows = reader.read_rows(block)
                self._check_tokens(rows.tokens, rows.token_count)
                self.sources.append(rows.source)
                self.rows.append(rows.source_row)
                self.groups.append(np.unique(rows.group))
                self._check_block(file, index, reader.block_span(block)[0], table)
            self._check_end(file, index)

    def _check_tokens(self, tokens: NDArray[np.uint16], counts: NDArray[np.int64]) -> None:
        spec = self._manifest.tokenizer
        if counts.min() < 1 or counts.max() > spec.context or tokens.max() >= spec.vocab_size:
            raise InputError(
                f"shard {self._info.name}: it holds tokens outside {spec.context} of {spec.vocab_size:,}; "
                "run python -m ingest.retokenize, or ingest again"
            )

    def _check_block(self, file: BinaryIO, index: BinaryIO, first: int, table: pa.Table) -> None:
        """Compare tar and index, where they stand, with what the table says of one block."""
        for number, row in enumerate(table.drop_columns(_NOT_IN_TAR).to_pylist(), first):
            line = index_line(self._check_sample(file, number, row))
            self._expect(index, f"{line}\n".encode("ascii"))

    def _check_sample(self, file: BinaryIO, number: int, row: dict) -> tuple[Member, ...]:
        key = row["key"]
        where = f"shard {self._info.name}, sample {key}, offset {file.tell():,}"
        if key != sample_key(row["source"], row["row"]):
            raise InputError(f"{where}: the key does not name its source row")
        start = file.tell()
        name = f"{key}.{self._manifest.image.extension}"
        head = self._read(file, tar.BLOCK)
        image = self._read(file, row["size"])
        if head != tar.header(name, row["size"]) or row["offset"] != start + tar.BLOCK:
            raise InputError(f"{where}: the image's header or offset is wrong")
        if xxh3_64_intdigest(image) != row["xxh3"]:
            raise InputError(f"{where}: the image's bytes are not those that were ingested")
        if number in self._decode:
            self._decode_image(image, where)
        labels = {label: row[LABEL_PREFIX + label] for label in self._manifest.labels}
        contents = {"txt": text_bytes(row["text"]), "json": sample_json(labels, row["row"], row["source"])}
        expected = tar.padding(len(image))
        members = [Member(self._manifest.image.extension, row["offset"], row["size"], name)]
        rest = start + tar.BLOCK + len(image)
        for extension, data in contents.items():
            offset = rest + len(expected) + tar.BLOCK
            members.append(Member(extension, offset, len(data), f"{key}.{extension}"))
            expected += tar.member(f"{key}.{extension}", data)
        if self._read(file, len(expected)) != expected:
            raise InputError(f"{where}: report or labels in the tar differ from the table")
        return tuple(members)

    def _decode_image(self, image: bytes, where: str) -> None:
        try:
            decode_image(image, self._manifest.image)
        except ValueError as error:
            raise InputError(f"{where}: the image is as it was ingested, but {error}; ingest again") from None

    def _check_end(self, file: BinaryIO, index: BinaryIO) -> None:
        if self._read(file, len(tar.END) + 1) != tar.END:
            raise InputError(f"shard {self._info.name}: the tar does not end after its last sample")
        self._expect(index, b"")
        if index.read(1):
            raise InputError(f"shard {self._info.name}: the index does not end after its last sample; ingest again")
        if self._digest.hexdigest() != self._info.tar.xxh3:
            raise _changed(self._info, "tar")

    def _read(self, file: BinaryIO, size: int) -> bytes:
        """The next bytes of the tar, which enter its digest."""
        try:
            content = file.read(size)
        except OSError as error:
            raise InputError(f"shard {self._info.name}: cannot read its tar ({error.strerror})") from None
        self._digest.update(content)
        return content

    def _expect(self, index: BinaryIO, content: bytes) -> None:
        if index.read(len(content)) != content:
            raise InputError(f"shard {self._info.name}: the index does not match the tar; ingest again")


def _check_digest(path: Path, info: ShardInfo, expected: FileInfo) -> None:
    try:
        digest = file_digest(path)
    except OSError as error:
        raise InputError(f"shard {info.name}: cannot read {path.name} ({error.strerror})") from None
    if digest != expected.xxh3:
        raise _changed(info, path.suffix[1:])


def _changed(info: ShardInfo, suffix: str) -> InputError:
    return InputError(
        f"shard {info.name}: {info.name}.{suffix} changed after ingest (its digest is not the manifest's)"
    )
