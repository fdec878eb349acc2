"""`manifest.json`: dataclasses to JSON and back, checked on the way in because a manifest may come from anywhere."""

import errno
import itertools
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from shards.atomic import encode_json, write_atomic
from shards.errors import InputError
from shards.schema import (
    MANIFEST_NAME,
    MAX_BLOCK_ROWS,
    MAX_BLOCKS,
    MAX_CONTEXT,
    MAX_LABELS,
    MAX_SOURCE_ROWS,
    SCHEMA_VERSION,
    SPLITS,
    FileInfo,
    ImageSpec,
    Manifest,
    ShardInfo,
    SourceInfo,
    TokenizerSpec,
    shard_name,
)

MAX_BYTES = 64 << 20
"""A manifest takes 500 bytes a shard: 2,000 shards of 256 MB are a megabyte."""
MIN_SAMPLE_BYTES = 5 * 512
"""What a sample takes in the tar: three headers, an image and labels; its report may be empty."""
_HEX = re.compile(r"[0-9a-f]{32}")


def encode_manifest(manifest: Manifest) -> bytes:
    """Its JSON, in the order of the dataclass fields."""
    fields = asdict(manifest)
    del fields["digest"]
    return encode_json(fields)


def signed(manifest: Manifest) -> Manifest:
    """The manifest with the digest that it will have once written."""
    return replace(manifest, digest=xxh3_128_hexdigest(encode_manifest(manifest)))


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically: from here on the folder is a data set."""
    write_atomic(root / MANIFEST_NAME, encode_manifest(manifest))


def read_manifest(root: Path) -> Manifest:
    """Read and check `manifest.json`. InputError where it is missing, damaged, or of another version."""
    path = Path(root) / MANIFEST_NAME
    try:
        content = _read(path)
    except NotADirectoryError:
        raise InputError(f"{root} is a file; name the folder of shards") from None
    except PermissionError as error:
        raise InputError(f"{path} may not be read ({error.strerror}); change its permissions") from None
    except OSError as error:
        raise InputError(
            f"no shards here: cannot read {path} ({error.strerror}); make them with python -m ingest"
        ) from None
    try:
        fields = json.loads(content)
        version = fields["schema_version"]
        if version != SCHEMA_VERSION:
            raise InputError(f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; ingest again")
        return _decode(fields, xxh3_128_hexdigest(content))
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not a manifest ({type(error).__name__}: {reason}); ingest again") from None


def _read(path: Path) -> bytes:
    """The file, but no pipe, which would never end, and nothing huge."""
    stat = path.stat()
    if not path.is_file() or stat.st_size > MAX_BYTES:
        raise OSError(errno.EINVAL, f"it is no file of at most {MAX_BYTES:,} bytes")
    return path.read_bytes()


def _decode(fields: dict[str, Any], digest: str) -> Manifest:
    manifest = Manifest(
        schema_version=fields["schema_version"],
        image=ImageSpec(**fields["image"]),
        tokenizer=_decode_tokenizer(fields["tokenizer"]),
        labels=_decode_labels(fields["labels"]),
        block_rows=_count(fields["block_rows"], MAX_BLOCK_ROWS),
        seed=int(fields["seed"]),
        sources=tuple(_decode_source(source) for source in fields["sources"]),
        splits={split: _decode_split(split, shards) for split, shards in fields["splits"].items()},
        groups={split: (int(first), int(end)) for split, (first, end) in fields["groups"].items()},
        digest=digest,
    )
    _check_groups(manifest)
    _check_counts(manifest)
    return manifest


def _decode_tokenizer(fields: dict[str, Any]) -> TokenizerSpec:
    return TokenizerSpec(
        name=str(fields["name"]),
        digest=_digest(fields["digest"]),
        context=_count(fields["context"], MAX_CONTEXT),
        vocab_size=_count(fields["vocab_size"], 1 << 16),
    )


def _decode_labels(names: list[Any]) -> tuple[str, ...]:
    labels = tuple(str(name) for name in names)
    if not isinstance(names, list) or len(set(labels)) != len(labels) or len(labels) > MAX_LABELS:
        raise ValueError(f"{len(labels):,} labels, or one twice; {MAX_LABELS:,} different ones are the most")
    return labels


def _decode_source(fields: dict[str, Any]) -> SourceInfo:
    source = SourceInfo(**fields)
    _count(source.rows, MAX_SOURCE_ROWS)
    _count(source.samples + 1, MAX_SOURCE_ROWS + 1)
    return source


def _decode_split(split: str, shards: list[dict[str, Any]]) -> tuple[ShardInfo, ...]:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; valid: {', '.join(SPLITS)}")
    return tuple(_decode_shard(shard_name(split, number), shard) for number, shard in enumerate(shards))


def _decode_shard(name: str, fields: dict[str, Any]) -> ShardInfo:
    # The name is checked, not trusted: it becomes a path.
    if fields["name"] != name:
        raise ValueError(f"shard {fields['name']!r} stands where {name!r} belongs")
    return ShardInfo(
        name=name,
        rows=_count(fields["rows"]),
        tar=_decode_file(fields["tar"]),
        idx=_decode_file(fields["idx"]),
        parquet=_decode_file(fields["parquet"]),
        footer_bytes=_count(fields["footer_bytes"]),
        footer_xxh3=_digest(fields["footer_xxh3"]),
    )


def _decode_file(fields: dict[str, Any]) -> FileInfo:
    return FileInfo(bytes=_count(fields["bytes"]), xxh3=_digest(fields["xxh3"]))


def _count(value: Any, most: int = (1 << 63) - 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{value!r} is not a positive count up to {most:,}")
    return value


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise ValueError(f"{value!r} is not a digest")
    return value


def _check_groups(manifest: Manifest) -> None:
    """Ranges of group numbers must be disjoint: a group in two splits is a leak."""
    ranges = sorted(manifest.groups.values())
    for (_, end), (first, _) in itertools.pairwise(ranges):
        if first < end:
            raise ValueError(f"group ranges {ranges} of the splits overlap")


def _check_counts(manifest: Manifest) -> None:
    """Rows that the sources cannot have, or that could not be put in order, are a lie."""
    shards = [shard for split in manifest.splits.values() for shard in split]
    blocks = sum(-(-shard.rows // manifest.block_rows) for shard in shards)
    if blocks > MAX_BLOCKS:
        raise ValueError(f"{blocks:,} blocks; {MAX_BLOCKS:,} are the most")
    crowded = [shard.name for shard in shards if shard.rows * MIN_SAMPLE_BYTES > shard.tar.bytes]
    if crowded:
        raise ValueError(f"shard {crowded[0]} names more rows than its tar has room for")
