"""One ingest at a time in a folder, on any node; see `shards.lock`."""

from contextlib import AbstractContextManager
from pathlib import Path

from shards import lock

DEAD_AFTER_S = lock.DEAD_AFTER_S


def exclusive(path: Path) -> AbstractContextManager[lock.Lease]:
    """Hold the lock file `path` inside the block. InputError, naming host and process, where another holds it."""
    return lock.exclusive(path, f"another ingest is writing to {path.parent.parent}")
