"""What a worker of a Dask cluster does for an ingest: see that it works in the same surroundings, then do the task.

Dask logs the arguments of a task that fails, and the exception. Ours name films, and films are named after patients, so
everything travels sealed, and a failure travels back as a result.
"""

import functools
import os
import pickle
import platform
import socket
import traceback
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from PIL import features
from xxhash import xxh3_64

from ingest.config import SourceConfig
from ingest.fingerprint import version_of
from ingest.workdir import MARKER
from shards.atomic import write_atomic, writing_as
from shards.errors import InputError

_PACKAGES = ("shardclip", "numpy", "pillow", "simplejpeg", "pyarrow", "xxhash", "h5py", "pydicom", "python-gdcm")
_CODECS = {"libwebp": "webp", "OpenJPEG": "jpg_2000", "libjpeg": "jpg", "zlib": "zlib"}
"""Libraries inside Pillow, by its name of their feature; a distribution may build it with its own."""


class Sealed:
    """Anything picklable, of which nobody on the way sees more than that it is there."""

    def __init__(self, content: Any) -> None:
        # Compressed, for at its level DEBUG Dask logs messages byte by byte.
        self._content = zlib.compress(pickle.dumps(content), 1)

    def open(self) -> Any:
        """What was sealed."""
        return pickle.loads(zlib.decompress(self._content))


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What a task raised, as its result."""

    error: Exception


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What the process that plans an ingest has, and every worker must have too."""

    versions: dict[str, str]
    """Of what decides the bytes of the result."""
    marker: Path
    """A file in the output folder that belongs to this run alone."""
    films: tuple[tuple[int, Path, int | None], ...]
    """Number of a source, its HDF5 file and that one's size in bytes, or its folder of images and None."""

    @classmethod
    def here(cls, sources: Sequence[SourceConfig], work: Path) -> Self:
        """Those of this process, which leaves a marker in the work folder."""
        for old in work.glob(f"{MARKER}*"):
            old.unlink()
        # A new name for every run: no node remembers whether it was there, and a worker that is still at an earlier
        # run's tasks starts no more of them.
        marker = work.absolute() / f"{MARKER}{uuid.uuid4().hex}"
        write_atomic(marker, b"")
        places = [
            (number, path.absolute())
            for number, source in enumerate(sources)
            for path in (source.h5 if source.images is None else (source.images,))
        ]
        films = tuple((number, path, _look(path)) for number, path in places)
        return cls(versions=installed(), marker=marker, films=films)

    def check(self) -> None:
        """InputError, naming the host, where this process is in other surroundings."""
        host = socket.gethostname()
        ours = installed()
        for name, expected in self.versions.items():
            if ours.get(name) != expected:
                raise InputError(
                    f"the worker on {host} has {name} {ours.get(name)}, the ingest {expected}, and other versions make "
                    "other bytes; start the workers from the same environment"
                )
        if not self.marker.exists():
            raise InputError(
                f"the worker on {host} does not see the output folder; it must lie on a file system that all nodes "
                "share, under the same path"
            )
        if not os.access(self.marker.parent, os.W_OK):
            raise InputError(f"the worker on {host} may not write to the output folder; run it as the same user")
        for number, path, size in self.films:
            if _look(path) != size:
                raise InputError(
                    f"the worker on {host} does not see the films of source {number} as this run does; all nodes need "
                    "the same files under the same path"
                )


def _look(path: Path) -> int | None:
    """Size of a file; None for a folder that is not empty, as the place of a missing mount is; -1 for neither."""
    try:
        if not path.is_dir():
            return path.stat().st_size
        with os.scandir(path) as entries:
            return None if any(True for _ in entries) else -1
    except OSError:
        return -1


@functools.cache
def installed() -> dict[str, str]:
    """Versions of everything that decides the bytes of the result, in this process."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    found |= {name: version_of(name) for name in _PACKAGES}
    found |= {f"Pillow's {name}": str(features.version(feature)) for name, feature in _CODECS.items()}
    return found | {"shardclip's code": _code()}


def _code() -> str:
    """Digest of our own source files, which may change without a new version number."""
    digest = xxh3_64()
    root = Path(__file__).resolve().parent.parent
    for package in ("ingest", "shards"):
        for path in sorted((root / package).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Errand:
    """A task with what it takes to do it."""

    surroundings: Surroundings
    function: Callable[[Any], Any]
    task: Any


def run_sealed(errand: Sealed) -> Sealed:
    """Do an errand; the result is sealed and may be a Failure. Raises nothing, so that nothing is logged."""
    try:
        job: Errand = errand.open()
        job.surroundings.check()
        # A worker that was given up for dead may be at the same task, even in this same process.
        with writing_as(f"{uuid.uuid4().hex[:12]}-"):
            return Sealed(job.function(job.task))
    except Exception as error:
        return Sealed(Failure(error=_portable(error)))


def _portable(error: Exception) -> Exception:
    """The error itself where it survives the journey, with where it was raised; the values in frames stay here."""
    where = f"on {socket.gethostname()}:\n" + "".join(traceback.format_tb(error.__traceback__))
    try:
        error.add_note(where)
        return pickle.loads(pickle.dumps(error))
    except Exception:
        replacement = RuntimeError(f"{type(error).__name__} in a worker")
        replacement.add_note(where)
        return replacement


def no_task(_: None) -> None:
    """What a worker does that is only asked about its surroundings."""
