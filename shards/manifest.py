"""`manifest.json`: dataclasses to JSON and back, checked on the way in because a manifest may come from anywhere."""

import itertools
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from shards.atomic import write_atomic
from shards.errors import InputError
from shards.schema import (
    MANIFEST_NAME,
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

_HEX = re.compile(r"[0-9a-f]{32}")


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON, UTF-8, in the order of the dataclass fields, one item a line."""
    fields = asdict(manifest)
    del fields["digest"]
    return (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode()


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically: from here on the folder is a data set."""
    write_atomic(root / MANIFEST_NAME, encode_manifest(manifest))


def read_manifest(root: Path) -> Manifest:
    """Read and check `manifest.json`. InputError where it is missing, damaged, or of another version."""
    path = Path(root) / MANIFEST_NAME
    try:
        content = path.read_bytes()
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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a manifest ({type(error).__name__}: {error}); ingest again") from None


def _decode(fields: dict[str, Any], digest: str) -> Manifest:
    manifest = Manifest(
        schema_version=fields["schema_version"],
        image=ImageSpec(**fields["image"]),
        tokenizer=TokenizerSpec(**fields["tokenizer"]),
        labels=tuple(str(name) for name in fields["labels"]),
        block_rows=_count(fields["block_rows"]),
        seed=int(fields["seed"]),
        sources=tuple(SourceInfo(**source) for source in fields["sources"]),
        splits={split: _decode_split(split, shards) for split, shards in fields["splits"].items()},
        groups={split: (int(first), int(end)) for split, (first, end) in fields["groups"].items()},
        digest=digest,
    )
    _check_groups(manifest)
    return manifest


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


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} is not a positive count")
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
