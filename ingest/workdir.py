"""The output folder: who may write to it, and what an interrupted ingest left there.

`OUT/.ingest/` holds spills, notes on finished shards and `inputs.json`, the fingerprint of what is being ingested. It
goes when the manifest is written; the fingerprint stays as `OUT/ingest.json`, so that the same command given again,
by a job that is queued once more, knows that nothing is left to do.
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ingest.config import IngestConfig, SourceConfig
from shards.atomic import remove_temporary, sync_folder, write_json
from shards.digest import file_digest
from shards.errors import InputError
from shards.lock import exclusive
from shards.manifest import read_manifest
from shards.schema import INPUTS_NAME, MANIFEST_NAME, SCHEMA_VERSION, Manifest

WORK_NAME = ".ingest"
_INPUTS = "inputs.json"
_LOCK = "lock"
MARKER = "shared-"
"""How the file is called by which workers of a cluster know the folder (`ingest.remote`)."""
_VERSIONS = ("shardclip", "numpy", "pillow", "simplejpeg", "pyarrow", "ftfy", "regex")
"""Packages that decide the bytes of the result."""
_READING = 3
"""Of how films become grey levels, where it changes: an ingest under way takes no films by another rule."""
_NOT_INPUTS = ("to_shards", "workers", "scheduler", "scheduler_wait", "dry_run", "max_rejects", "sources")
_NOT_SETTINGS = ("h5", "csv", "images", "text_folder", "allow_label_numbers")
"""Of a source: paths, of which the files count, and what only says whether to refuse."""
_FOLDER = "(which folder)"
"""Looked at after the end only: on another node an ingest may go on with the same folder under another number."""
_SETTING = re.compile(r"(?:source (\d+) )?([a-z]\w*)(?: file (\d+)| \(which folder\))?")
"""A name in a fingerprint; those of versions are none."""
_REMOVERS = 16
"""Threads that remove work files."""


def fingerprint(config: IngestConfig) -> dict[str, Any]:
    """What decides the bytes of the result: settings, digests of the CSV files, size and time of the HDF5 files.

    Taken before anything is read: what changes from then on is another ingest's.
    """
    versions = {f"version of {name}": version_of(name) for name in _VERSIONS}
    inputs: dict[str, Any] = {"schema version": SCHEMA_VERSION, **_settings(config), **versions}
    if any(source.images or source.value_range for source in config.source_list()):
        inputs["version of the reading of films"] = _READING
    for number, source in enumerate(config.source_list()):
        inputs |= {f"source {number} {name}": value for name, value in _source_inputs(source).items()}
    return json.loads(json.dumps(inputs))


def _settings(config: IngestConfig) -> dict[str, Any]:
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
    return inputs | {f"{name} {_FOLDER}": _inode(path) for name, path in folders.items() if path is not None}


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


@contextlib.contextmanager
def open_work(config: IngestConfig, begun: dict[str, Any]) -> Iterator[Path]:
    """Make or reopen OUT/.ingest, locked, for the block. InputError where OUT holds anything but this same ingest.

    `begun`: its fingerprint, of which settings may have been chosen since.
    """
    out, inputs = config.to_shards, begun | json.loads(json.dumps(_settings(config)))
    work = out / WORK_NAME
    try:
        out.mkdir(parents=True, exist_ok=True)
        _check_folder(out)
        work.mkdir(exist_ok=True)
        with exclusive(work / _LOCK, f"another ingest is writing to {out}"):
            _check_folder(out)  # that other one may have ended since
            _check_same(out, work, inputs)
            remove_temporary(out, work)
            write_json(work / _INPUTS, inputs)
            try:
                yield work
            finally:
                remove_temporary(out, work)  # of workers that were killed because another one failed
    except OSError as error:
        raise _cannot_write(out, error) from None


def finished_set(config: IngestConfig) -> Manifest | None:
    """What this same ingest made, where OUT holds it, finished; None where there is no finished data set.

    Image files and files of reports are not looked at again, nor versions of packages: what is there is whole.
    InputError where OUT holds another one, naming what differs.
    """
    out = config.to_shards
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(out)
    remove_work(out)  # a kill may have come between the manifest and this
    another = f"{out} already holds a finished data set of {manifest.samples:,} samples"
    try:
        before = json.loads((out / INPUTS_NAME).read_bytes())
    except (OSError, ValueError):
        raise InputError(
            f"{another}, and no {INPUTS_NAME} that says of what; use it as it is, or choose another folder"
        ) from None
    now = fingerprint(config)
    changed = [name for name in _differing(before, now) if not name.startswith("version of ")]
    if config.encoding == "auto" and "encoding" in changed:  # the same inputs make the same pick
        changed.remove("encoding")
    if changed:
        raise InputError(f"{another}, made with another {_shown(changed, now)}; choose another folder")
    return manifest


def _check_folder(out: Path) -> None:
    names = {path.name for path in out.iterdir()}
    if MANIFEST_NAME in names:
        raise InputError(f"{out} was finished by another ingest just now; run the command again to see what it holds")
    if names and WORK_NAME not in names:
        raise InputError(f"{out} is not empty and holds no interrupted ingest; choose another folder")


def _differing(before: Any, now: dict[str, Any]) -> list[str]:
    """Names of what is another in one of two fingerprints; of all where the first is none."""
    before = before if isinstance(before, dict) else {}
    return [name for name in now | before if before.get(name) != now.get(name)]


def _changed(before: Any, now: dict[str, Any]) -> str:
    """The same for an ingest under way, for a message; nothing where all is as it was."""
    return _shown([name for name in _differing(before, now) if not name.endswith(_FOLDER)], now)


def _shown(names: list[str], inputs: dict[str, Any]) -> str:
    """Names in fingerprints as the flags that a user gave."""
    several = any(name.startswith("source 1 ") for name in inputs)
    shown = []
    for name in names:
        found = _SETTING.fullmatch(name)
        if found:
            source, setting, file = found.groups()
            what = "its content" if setting == "csv" else "its size or time of change"
            name = f"--{setting.replace('_', '-')}"
            name += f" (file {int(file) + 1}, {what})" if file else f" {_FOLDER}" * found[0].endswith(_FOLDER)
            name += f" of source {source}" if source and several else ""
        shown.append(name)
    return ", ".join(shown)


def _cannot_write(out: Path, error: OSError) -> InputError:
    """What a full, read-only or broken disk says, in one line."""
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return InputError(f"{out} cannot be made a folder ({error.strerror}); choose another")
    what = Path(error.filename).name if error.filename else "a file"
    free = f"{shutil.disk_usage(out).free / 1e6:,.0f} MB are free there" if out.exists() else "the folder is not there"
    return InputError(
        f"cannot write {what} to {out} ({error.strerror}); {free}; make room (--dry-run says how much is needed) "
        "and run the same command again to go on"
    )


def _check_same(out: Path, work: Path, inputs: dict[str, Any]) -> None:
    # Refused before a film was encoded; but of a cluster's run workers may still be at films, by its settings.
    encoded = os.listdir(out) != [WORK_NAME] or any(work.glob("*.spill")) or any(work.glob(f"{MARKER}*"))
    if not encoded:
        for path in work.iterdir():
            if path.name != _LOCK:
                path.unlink(missing_ok=True)  # another start asks for the lock, and removes what it asked with
        return
    try:
        before = json.loads((work / _INPUTS).read_bytes())
    except (OSError, ValueError):
        before = {}
    if changed := _changed(before, inputs):
        raise InputError(
            f"{out} holds an interrupted ingest with another {changed}; "
            f"run it with what it was started with, or remove the folder ({WORK_NAME} is in it) to begin anew"
        )


def check_unchanged(config: IngestConfig, work: Path) -> None:
    """InputError where a CSV or HDF5 file is no longer what it was when the ingest was begun."""
    before, now = json.loads((work / _INPUTS).read_bytes()), fingerprint(config)
    if changed := _changed(before, now):
        raise InputError(f"{changed} changed while it was read; empty {work.parent} and ingest again")


def remove_work(out: Path) -> None:
    """Remove OUT/.ingest once the manifest stands, and what lost workers of a cluster left beside the shards.

    The fingerprint moves out of it first: whatever is killed when, it is in one place or the other.
    """
    if (out / WORK_NAME).exists():
        remove_temporary(out)
        try:
            os.replace(out / WORK_NAME / _INPUTS, out / INPUTS_NAME)
            sync_folder(out)
        except FileNotFoundError:  # moved by a run that was killed since
            pass
        except OSError as error:
            raise _cannot_write(out, error) from None
        with ThreadPoolExecutor(_REMOVERS) as threads, contextlib.suppress(OSError):
            for path in (out / WORK_NAME).iterdir():
                threads.submit(path.unlink, missing_ok=True)  # 6 ms a spill, of waiting
    shutil.rmtree(out / WORK_NAME, ignore_errors=True)
