"""A file under its final name is complete: temporary name, fsync, rename, fsync the folder."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY_PREFIX = ".tmp-"
_BUFFER = 1 << 20
"""Bytes written at once: the kernel takes 24 KB at a time at half the speed."""

_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}
"""PostgreSQL's fsync_fname, too, takes these for a file system without fsync of folders."""

_writer: ContextVar[str] = ContextVar("writer", default="")
"""Stands in the temporary names of this thread's files."""


@contextlib.contextmanager
def writing_as(name: str) -> Iterator[None]:
    """Inside the block, temporary files carry `name`: for a file that somebody else may be writing at the same time.

    A node that was given up for dead may still be at work; each then finishes its own file, and the last rename wins.
    What a killed writer leaves is not overwritten by the next try: call `remove_temporary` on the folder.
    """
    token = _writer.set(name)
    try:
        yield
    finally:
        _writer.reset(token)


def remove_temporary(*folders: Path) -> None:
    """Remove what killed writers left in folders that nobody else may be writing to."""
    for folder in folders:
        for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; rename it to `path` on success, delete it on any error.

    The temporary name is fixed for a path (unless inside `writing_as`), so what a killed process left is overwritten by
    the next try. `durable=False` does not wait for the disk: for work files that prove themselves by a digest.
    OSError where `path` is a device or a pipe: renamed over, `/dev/null` would be gone for everybody.
    """
    check_replaceable(path)
    temporary = path.with_name(TEMPORARY_PREFIX + _writer.get() + path.name)
    try:
        with open(temporary, "wb", buffering=_BUFFER) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            # write and fsync do not say which file was too much for the disk; nobody asked for the temporary one.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    if durable:
        sync_folder(path.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(content)


def check_replaceable(path: Path) -> None:
    """OSError where a file cannot take the place of what is there: a device, a pipe, or a stream of this process."""
    if path.parent == Path("/dev") or (path.exists() and not (path.is_file() or path.is_dir())):
        raise OSError(errno.EEXIST, "it is a device or a pipe", str(path))


def encode_json(content: Any) -> bytes:
    """Plain values as JSON in UTF-8, an item a line, letters as they are for whoever reads it.

    Python's half letters, which stand for the bytes of a file's name that is not UTF-8, are written as JSON escapes.
    """
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """A file of plain values, complete or absent."""
    write_atomic(path, encode_json(content))


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Before long work whose result goes to the file `path`, or into the `folder`, which is made. OSError if it cannot.

    A file is made and removed there: neither permission bits nor root's rights tell of a read-only file system.
    """
    if folder:
        path.mkdir(parents=True, exist_ok=True)
    elif path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    else:
        check_replaceable(path)
    probe = (path if folder else path.parent) / f"{TEMPORARY_PREFIX}probe-{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power loss; some network file systems cannot, and need not, be asked to."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)
