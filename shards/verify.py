"""`python -m shards verify DIR`: every byte of everything.

A tar is not parsed: its bytes are made anew from the table and compared, so nothing can hide in a header, in padding,
or between members. Digests bind the three files to the manifest.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from xxhash import xxh3_64_intdigest, xxh3_128

from shards import tar
from shards.errors import InputError
from shards.index import Member, encode_index
from shards.manifest import read_manifest
from shards.reader import ShardReader
from shards.schema import LABEL_PREFIX, MANIFEST_NAME, REJECTS_NAME, FileInfo, Manifest, ShardInfo, sample_key
from shards.writer import sample_json, text_bytes

_CHUNK = 1 << 22


def verify(root: Path) -> Iterator[tuple[str, str | None]]:
    """Check a data set shard by shard; yields (shard name, problem or None) for each. InputError without a manifest.

    Keys must be unique over all splits; a file that the manifest does not know is a problem of the folder.
    """
    manifest = read_manifest(root)
    seen: set[str] = set()
    for split, shards in manifest.splits.items():
        for info in shards:
            try:
                _verify_shard(root, manifest, split, info, seen)
                yield info.name, None
            except InputError as error:
                yield info.name, str(error)
    stray = _stray_files(root, manifest)
    if stray:
        yield "folder", f"{len(stray)} files the manifest does not know, {stray[0]} first"


def _verify_shard(root: Path, manifest: Manifest, split: str, info: ShardInfo, seen: set[str]) -> None:
    for suffix, expected in (("tar", info.tar), ("idx", info.idx), ("parquet", info.parquet)):
        _check_digest(root / f"{info.name}.{suffix}", info, expected)
    with ShardReader(root, manifest, info) as reader:
        for block in range(reader.blocks):
            reader.read_rows(block)
        table = reader.read_table()
    rows = table.to_pylist()
    keys = [row["key"] for row in rows]
    if len(set(keys)) != len(keys) or not seen.isdisjoint(keys):
        raise InputError(f"shard {info.name}: a key of {split} appears twice in the data set; ingest again")
    seen.update(keys)
    members = _verify_tar(root, manifest, info, rows)
    if (root / f"{info.name}.idx").read_bytes() != encode_index(members):
        raise InputError(f"shard {info.name}: the index does not match the tar; ingest again")
    if not table.schema.field("tokens").type.equals(pa.list_(pa.uint16(), manifest.tokenizer.context)):
        raise InputError(f"shard {info.name}: its tokens are not uint16[{manifest.tokenizer.context}]")


def _check_digest(path: Path, info: ShardInfo, expected: FileInfo) -> None:
    digest = xxh3_128()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"shard {info.name}: cannot read {path.name} ({error.strerror})") from None
    if digest.hexdigest() != expected.xxh3:
        raise InputError(f"shard {info.name}: {path.name} changed after ingest (its digest is not the manifest's)")


def _verify_tar(root: Path, manifest: Manifest, info: ShardInfo, rows: list[dict]) -> list[tuple[Member, ...]]:
    """Compare the tar byte for byte with what the table says it holds; returns the members for the index."""
    members = []
    with open(root / f"{info.name}.tar", "rb") as file:
        for row in rows:
            members.append(_verify_sample(file, manifest, info, row))
        if file.read() != tar.END:
            raise InputError(f"shard {info.name}: the tar does not end after its last sample")
    return members


def _verify_sample(file, manifest: Manifest, info: ShardInfo, row: dict) -> tuple[Member, ...]:
    key = row["key"]
    where = f"shard {info.name}, sample {key}, offset {file.tell():,}"
    if key != sample_key(row["source"], row["row"]):
        raise InputError(f"{where}: the key does not name its source row")
    start = file.tell()
    name = f"{key}.{manifest.image.extension}"
    head = file.read(tar.BLOCK)
    image = file.read(row["size"])
    if head != tar.header(name, row["size"]) or row["offset"] != start + tar.BLOCK:
        raise InputError(f"{where}: the image's header or offset is wrong")
    if xxh3_64_intdigest(image) != row["xxh3"]:
        raise InputError(f"{where}: the image's bytes are not those that were ingested")
    labels = {label: row[LABEL_PREFIX + label] for label in manifest.labels}
    contents = {"txt": text_bytes(row["text"]), "json": sample_json(labels, row["row"], row["source"])}
    expected = tar.padding(len(image)) + b"".join(tar.member(f"{key}.{ext}", data) for ext, data in contents.items())
    rest = start + tar.BLOCK + len(image) + len(tar.padding(len(image)))
    members = [Member(manifest.image.extension, row["offset"], row["size"], name)]
    for extension, data in contents.items():
        members.append(Member(extension, rest + tar.BLOCK, len(data), f"{key}.{extension}"))
        rest += len(tar.member("x", data))
    if file.read(len(expected)) != expected:
        raise InputError(f"{where}: report or labels in the tar differ from the table")
    return tuple(members)


def _stray_files(root: Path, manifest: Manifest) -> list[str]:
    known = {MANIFEST_NAME, REJECTS_NAME}
    for shards in manifest.splits.values():
        known |= {f"{info.name}.{suffix}" for info in shards for suffix in ("tar", "idx", "parquet")}
    return sorted(path.name for path in root.iterdir() if path.name not in known)
