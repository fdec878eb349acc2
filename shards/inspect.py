"""`python -m shards inspect DIR [--sample KEY]`: the manifest in a page of text, or one sample."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
from tyro.conf import Positional

from shards.cli import say
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.reader import ShardReader
from shards.scan import read_image, scan
from shards.schema import LABEL_PREFIX, Manifest, table_schema

_KEYS_AT_ONCE = 10_000
"""Keys read at once: 140 KB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """Say what a data set holds, or show one sample."""

    root: Positional[Path]
    """Folder of shards."""
    sample: str | None = None
    """Key of a sample to show, its report included."""


def run(config: InspectConfig) -> None:
    """Print the page."""
    for line in show_sample(config.root, config.sample) if config.sample else describe(config.root):
        say(line)


def describe(root: Path) -> Iterator[str]:
    """Lines that say what a data set holds."""
    manifest = read_manifest(root)
    image, tokenizer = manifest.image, manifest.tokenizer
    codec = f"jpeg quality {image.quality}" if image.codec == "jpeg" else image.codec
    yield f"shards       {root}  (schema version {manifest.schema_version}, digest {manifest.digest})"
    yield f"images       {image.height} x {image.width} x {image.channels}, {codec}"
    yield f"tokens       {tokenizer.name}, {tokenizer.context} a report out of {tokenizer.vocab_size:,}"
    yield f"labels       {', '.join(manifest.labels) or 'none'}"
    yield f"blocks       {manifest.block_rows} rows"
    for number, source in enumerate(manifest.sources):
        yield f"source {number:02d}    {source.kind}, {source.rows:,} rows, {source.samples:,} samples"
    for split in manifest.splits:
        yield _describe_split(manifest, split)


def _describe_split(manifest: Manifest, split: str) -> str:
    shards = manifest.splits[split]
    megabytes = sum(info.tar.bytes for info in shards) / 1e6
    first, end = manifest.groups.get(split, (0, 0))
    # No count: a patient whose films were all rejected has a number, too.
    patients = f", patients {first}..{end - 1}" if split in manifest.groups else ""
    return f"{split:<12} {manifest.rows(split):,} samples{patients}, {megabytes:,.1f} MB in {len(shards):,} tars"


def show_sample(root: Path, key: str) -> Iterator[str]:
    """Lines about one sample, its report among them: for the terminal of somebody who may read it."""
    manifest = read_manifest(root)
    for block in scan(root, manifest, ["key"], rows=_KEYS_AT_ONCE):
        found = pc.index(block.table["key"], key).as_py()
        if found >= 0:
            number = block.first + found
            columns = table_schema(manifest.tokenizer.context, manifest.labels).names
            table = block.reader.read_columns(number // manifest.block_rows, columns)
            (row,) = table.slice(number % manifest.block_rows, 1).to_pylist()
            yield from _describe_row(block.reader, manifest, number, row)
            return
    raise InputError(f"no sample {key!r} in {root}; keys look like 00-0000000123")


def _describe_row(reader: ShardReader, manifest: Manifest, number: int, row: dict) -> Iterator[str]:
    labels = {name: row[LABEL_PREFIX + name] for name in manifest.labels}
    image = read_image(reader, row)
    yield f"key          {row['key']}  (shard {reader.info.name}, row {number})"
    yield f"image        {len(image):,} bytes at offset {row['offset']:,}, xxh3 {row['xxh3']:016x}"
    yield f"text         {row['text']}"
    cut = ", truncated" if row["truncated"] else ""
    yield f"tokens       {row['token_count']}{cut}: {row['tokens'][: row['token_count']]}"
    yield f"side words   {'yes' if row['side_words'] else 'no'}"
    yield f"group        {row['group']}"
    yield f"labels       {json.dumps(labels, ensure_ascii=False)}"
