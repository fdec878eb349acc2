"""The output folder: who may write to it, and what an interrupted ingest left there.

`OUT/.ingest/` holds spills, notes on finished shards and `inputs.json`, the fingerprint of what is being ingested. It
goes when the manifest is written; the fingerprint stays as `OUT/ingest.json`, so that the same command given again,
by a job that is queued once more, knows that nothing is left to do.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ingest.config import IngestConfig
from ingest.fingerprint import changed, differing, fingerprint, settings, shown, unread
from shards.atomic import remove_temporary, sync_folder, write_json
from shards.errors import InputError
from shards.lock import exclusive
from shards.manifest import read_manifest
from shards.schema import INPUTS_NAME, MANIFEST_NAME, Manifest

WORK_NAME = ".ingest"
_INPUTS = "inputs.json"
_LOCK = "lock"
MARKER = "shared-"
"""How the file is called by which workers of a cluster know the folder (`ingest.remote`)."""
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
"""Where room would not help; network file systems say EIO of a full quota, too."""
_REMOVERS = 16
"""Threads that remove work files."""


@contextlib.contextmanager
def open_work(config: IngestConfig, begun: dict[str, Any]) -> Iterator[Path]:
    """Make or reopen OUT/.ingest, locked, for the block. InputError where OUT holds anything but this same ingest.

    `begun`: its fingerprint, of which settings may have been chosen since.
    """
    out, inputs = config.to_shards, _chosen(config, begun)
    work = out / WORK_NAME
    try:
        out.mkdir(parents=True, exist_ok=True)
        _check_folder(out)
        work.mkdir(exist_ok=True)
        with exclusive(work / _LOCK, f"another ingest is writing to {out}"):
            _check_folder(out)  # that other one may have ended since
            if _has_films(out, work):
                _check_same(out, work, inputs)
            else:
                _clear(work)
            remove_temporary(out, work)
            write_json(work / _INPUTS, inputs)
            try:
                yield work
            finally:
                remove_temporary(out, work)  # of workers that were killed because another one failed
    except OSError as error:
        raise _cannot_write(out, error) from None


def _chosen(config: IngestConfig, begun: dict[str, Any]) -> dict[str, Any]:
    return begun | json.loads(json.dumps(settings(config)))


def goes_on(config: IngestConfig, begun: dict[str, Any]) -> bool:
    """Whether OUT holds this same ingest, unfinished; for `begun` see `open_work`. Nothing is touched.

    InputError where it holds another.
    """
    out = config.to_shards
    work = out / WORK_NAME
    if not work.is_dir() or not _has_films(out, work):
        return False
    _check_same(out, work, _chosen(config, begun))
    return True


def finished_set(config: IngestConfig) -> Manifest | None:
    """What this same ingest made, where OUT holds it, finished; None where there is no finished data set.

    Image files and files of reports are not looked at again, nor versions of packages: what is there is whole.
    InputError where OUT holds another one, naming what differs.
    """
    out = config.to_shards
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(out)
    if not config.dry_run:
        remove_work(out)  # a kill may have come between the manifest and this
    another = f"{out} already holds a finished data set of {manifest.samples:,} samples"
    before, now = _noted(out / INPUTS_NAME) or _noted(out / WORK_NAME / _INPUTS), fingerprint(config)
    if not before:
        raise InputError(
            f"{another}, and no {INPUTS_NAME} that says of what; use it as it is, or choose another folder"
        )
    names = [name for name in differing(before, now) if not name.startswith("version of ")]
    if config.encoding == "auto" and "encoding" in names:  # the same inputs make the same pick
        names.remove("encoding")
    if gone := unread(names, now):
        raise InputError(
            f"{another}; whether of the same inputs cannot be told without {shown(gone, now)}; "
            "put it back, or use the set as it is"
        )
    if names:
        raise InputError(f"{another}, made with another {shown(names, now)}; choose another folder")
    return manifest


def _noted(path: Path) -> Any:
    """A fingerprint; nothing where there is none, or not whole."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    return {}


def check_place(out: Path) -> None:
    """InputError where an ingest would refuse the folder for what is in it. Nothing is touched."""
    try:
        if out.exists():
            _check_folder(out)
    except OSError as error:
        raise _cannot_write(out, error) from None


def _check_folder(out: Path) -> None:
    names = {path.name for path in out.iterdir()}
    if MANIFEST_NAME in names:
        raise InputError(f"{out} was finished by another ingest just now; run the command again to see what it holds")
    if names and WORK_NAME not in names:
        raise InputError(f"{out} is not empty and holds no interrupted ingest; choose another folder")


def _cannot_write(out: Path, error: OSError) -> InputError:
    """What a full, read-only or broken disk says, in one line."""
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return InputError(f"{out} cannot be made a folder ({error.strerror}); choose another")
    what = Path(error.filename).name if error.filename else "a file"
    advice = "mend that, or choose another folder"
    if error.errno not in _DENIED and out.exists():
        free = shutil.disk_usage(out).free / 1e6
        advice = f"{free:,.0f} MB are free there; make room (--dry-run says how much is needed)"
    return InputError(
        f"cannot write {what} to {out} ({error.strerror}); {advice}; the same command, run again, goes on"
    )


def _clear(work: Path) -> None:
    """Remove what an ingest left that was refused before a film was encoded."""
    for path in work.iterdir():
        if path.name != _LOCK:
            path.unlink(missing_ok=True)  # another start asks for the lock, and removes what it asked with


def _has_films(out: Path, work: Path) -> bool:
    """Whether an ingest got as far as its films; of a cluster's run workers may still be at them, by its settings."""
    return os.listdir(out) != [WORK_NAME] or any(work.glob("*.spill")) or any(work.glob(f"{MARKER}*"))


def _check_same(out: Path, work: Path, inputs: dict[str, Any]) -> None:
    if names := changed(_noted(work / _INPUTS), inputs):
        raise InputError(
            f"{out} holds an interrupted ingest with another {names}; "
            f"run it with what it was started with, or remove the folder ({WORK_NAME} is in it) to begin anew"
        )


def check_unchanged(config: IngestConfig, work: Path) -> None:
    """InputError where a CSV or HDF5 file is no longer what it was when the ingest was begun."""
    before, now = json.loads((work / _INPUTS).read_bytes()), fingerprint(config)
    if names := changed(before, now):
        raise InputError(f"{names} changed while it was read; empty {work.parent} and ingest again")


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
