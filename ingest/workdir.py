"""The output folder: who may write to it, and what an interrupted ingest left there.

`OUT/.ingest/` holds spills, notes on finished shards and `inputs.json`, the fingerprint of what is being ingested. It
goes when the manifest is written.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from ingest.config import IngestConfig, SourceConfig
from shards.atomic import write_atomic
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.schema import MANIFEST_NAME, SCHEMA_VERSION

WORK_NAME = ".ingest"
_INPUTS = "inputs.json"
_NOT_INPUTS = ("to_shards", "workers", "dry_run", "max_rejects", "sources")
_PATHS = ("h5", "csv", "images", "text_folder")


def fingerprint(config: IngestConfig) -> dict[str, Any]:
    """What decides the bytes of the result: settings, digests of the CSV files, size and time of the HDF5 files."""
    source_fields = {field.name for field in dataclasses.fields(SourceConfig)}
    settings = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in source_fields and field.name not in _NOT_INPUTS
    }
    inputs: dict[str, Any] = {"schema version": SCHEMA_VERSION, **settings}
    for number, source in enumerate(config.source_list()):
        inputs |= {f"source {number} {name}": value for name, value in _source_inputs(source).items()}
    return json.loads(json.dumps(inputs))


def _source_inputs(source: SourceConfig) -> dict[str, Any]:
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    inputs = {name: value for name, value in fields.items() if name not in _PATHS}
    inputs |= {f"csv file {number}": _digest(path) for number, path in enumerate(source.csv)}
    inputs |= {f"h5 file {number}": _stamp(path) for number, path in enumerate(source.h5)}
    return inputs


def _stamp(path: Path) -> str:
    """Size and time of change: a digest of 190 GB would cost as much as the ingest."""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def open_work(config: IngestConfig) -> Path:
    """Make or reopen OUT/.ingest. InputError where OUT holds anything but this same ingest, interrupted."""
    out, inputs = config.to_shards, fingerprint(config)
    work = out / WORK_NAME
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in out.iterdir()}
    except OSError as error:
        raise InputError(f"cannot write to {out} ({error.strerror})") from None
    if MANIFEST_NAME in names:
        rows = sum(map(read_manifest(out).rows, read_manifest(out).splits))
        raise InputError(f"{out} already holds a finished data set of {rows:,} samples; choose another folder")
    if WORK_NAME in names:
        _check_same(out, work, inputs)
    elif names:
        raise InputError(f"{out} is not empty and holds no interrupted ingest; choose another folder")
    if not os.access(out, os.W_OK):
        raise InputError(f"cannot write to {out}; choose another folder")
    work.mkdir(exist_ok=True)
    write_atomic(work / _INPUTS, json.dumps(inputs).encode())
    return work


def _check_same(out: Path, work: Path, inputs: dict[str, Any]) -> None:
    try:
        before = json.loads((work / _INPUTS).read_bytes())
    except FileNotFoundError:
        before = inputs  # killed before anything was begun
    except ValueError:
        before = {}
    changed = [name for name in inputs if before.get(name) != inputs[name]]
    if changed:
        raise InputError(
            f"{out} holds an interrupted ingest with another {', '.join(changed)}; "
            "run it with what it was started with, or empty the folder to begin anew"
        )


def remove_work(out: Path) -> None:
    """Remove OUT/.ingest once the manifest stands."""
    shutil.rmtree(out / WORK_NAME, ignore_errors=True)


def _digest(path: Path) -> str:
    digest = xxh3_128()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from None
    return digest.hexdigest()
