"""Whether the files that a bench is given belong together, as far as a look tells: nobody compares two data sets."""

from pathlib import Path

from ingest.reports import read_columns
from ingest.source import H5Source
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.reader import ShardReader


def check_pairs(
    shards: Path, *, raw_shards: Path | None, h5: Path | None, csv: tuple[Path, ...], text_column: str
) -> None:
    """InputError where the HDF5 or CSV files are not those that the shards were made from, as far as a look tells."""
    manifest = read_manifest(shards)
    if raw_shards:
        raw = read_manifest(raw_shards)
        _check_rows(f"{raw_shards}", raw.sources[0].rows, manifest.sources[0].rows)
        if raw.image.codec != "raw":
            raise InputError(f"{raw_shards} holds {raw.image.codec} images; ingest with --encoding raw")
    if h5:
        with H5Source(h5) as source:
            _check_rows(f"{h5}", source.rows, manifest.sources[0].rows)
    if csv:
        texts = read_columns(csv, (text_column,))[text_column]
        _check_rows("the CSV", len(texts), manifest.sources[0].rows)
        info = next(iter(manifest.splits.values()))[0]
        with ShardReader(shards, manifest, info) as reader:
            ours, rows = reader.read_text(0), reader.read_rows(0).source_row
        if ours != texts.take(rows).to_pylist():
            raise InputError(
                f"the reports of {info.name} are not those of the CSV; give the files the shards were made from"
            )


def _check_rows(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise InputError(
            f"{what} has {found:,} rows, the shards were made from {expected:,}; give the files they were made from"
        )
