"""What decides the bytes of an ingest's result, and what differs between two, called as a user gave it."""

import contextlib
import dataclasses
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

from ingest.config import IngestConfig, SourceConfig
from shards.digest import file_digest
from shards.schema import SCHEMA_VERSION

_VERSIONS = ("shardclip", "numpy", "pillow", "simplejpeg", "pyarrow", "ftfy", "regex")
"""Packages that decide the bytes of the result."""
_READING = 3
"""Of how films become grey levels, where it changes: an ingest under way takes no films by another rule."""
_NOT_INPUTS = ("to_shards", "workers", "scheduler", "scheduler_wait", "dry_run", "max_rejects", "sources")
_NOT_SETTINGS = ("h5", "csv", "images", "text_folder", "allow_label_numbers")
"""Of a source: paths, of which the files count, and what only says whether to refuse."""
FOLDER = "(which folder)"
"""Looked at after the end only: on another node an ingest may go on with the same folder under another number."""
_SETTING = re.compile(r"(?:source (\d+) )?([a-z]\w*)(?: file (\d+)| \(which folder\))?")
"""A name in a fingerprint; those of versions are none."""


def fingerprint(config: IngestConfig) -> dict[str, Any]:
    """What decides the bytes of the result: settings, digests of the CSV files, size and time of the HDF5 files.

    Taken before anything is read: what changes from then on is another ingest's.
    """
    versions = {f"version of {name}": version_of(name) for name in _VERSIONS}
    inputs: dict[str, Any] = {"schema version": SCHEMA_VERSION, **settings(config), **versions}
    if any(source.images or source.value_range for source in config.source_list()):
        inputs["version of the reading of films"] = _READING
    for number, source in enumerate(config.source_list()):
        inputs |= {f"source {number} {name}": value for name, value in _source_inputs(source).items()}
    return json.loads(json.dumps(inputs))


def settings(config: IngestConfig) -> dict[str, Any]:
    """Of all sources together."""
    source_fields = {field.name for field in dataclasses.fields(SourceConfig)}
    fields = (field.name for field in dataclasses.fields(config))
    return {name: getattr(config, name) for name in fields if name not in source_fields and name not in _NOT_INPUTS}


def version_of(name: str) -> str:
    """Of a package; `none` for what runs from a folder that was copied, without being installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _source_inputs(source: SourceConfig) -> dict[str, Any]:
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    inputs = {name: value for name, value in fields.items() if name not in _NOT_SETTINGS}
    inputs |= {f"csv file {number}": _digest(path) for number, path in enumerate(source.csv)}
    inputs |= {f"h5 file {number}": _stamp(path) for number, path in enumerate(source.h5)}
    folders = {"images": source.images, "text_folder": source.text_folder}
    return inputs | {f"{name} {FOLDER}": _inode(path) for name, path in folders.items() if path is not None}


def _inode(folder: Path) -> int | None:
    """Tells folders apart without naming them."""
    with contextlib.suppress(OSError):  # here and below: who reads it says so
        return folder.stat().st_ino
    return None


def _stamp(path: Path) -> str | None:
    """Size and time of change: a digest of 190 GB would cost as much as the ingest."""
    with contextlib.suppress(OSError):
        stat = path.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"
    return None


def _digest(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return file_digest(path) if path.is_file() else None  # a pipe would never end
    return None


def differing(before: Any, now: dict[str, Any]) -> list[str]:
    """Names of what is another in one of two fingerprints; of all where the first is none."""
    before = before if isinstance(before, dict) else {}
    return [name for name in now | before if before.get(name) != now.get(name)]


def changed(before: Any, now: dict[str, Any]) -> str:
    """The same for an ingest under way, for a message; nothing where all is as it was."""
    return shown([name for name in differing(before, now) if not name.endswith(FOLDER)], now)


def shown(names: list[str], inputs: dict[str, Any]) -> str:
    """Names in fingerprints as the flags that a user gave."""
    several = any(name.startswith("source 1 ") for name in inputs)
    shown = []
    for name in names:
        found = _SETTING.fullmatch(name)
        if found:
            source, setting, file = found.groups()
            what = "its content" if setting == "csv" else "its size or time of change"
            what = "which cannot be read" if unread([name], inputs) else what
            name = f"--{setting.replace('_', '-')}"
            name += f" (file {int(file) + 1}, {what})" if file else f" {FOLDER}" * found[0].endswith(FOLDER)
            name += f" of source {source}" if source and several else ""
        shown.append(name)
    return ", ".join(shown)


def unread(names: list[str], now: dict[str, Any]) -> list[str]:
    """Those of the names that are of files and folders which are not there now, or cannot be read."""
    return [name for name in names if (" file " in name or name.endswith(FOLDER)) and now.get(name, "") is None]
