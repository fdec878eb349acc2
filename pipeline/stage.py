"""Copies of shards on the node: made once by one process of the node, verified, used as they become complete.

    STAGE_DIR/shardclip-DIGEST/train-000000.idx, .parquet, .tar     DIGEST: that of the manifest

A thread of each loader on the node tries for the folder's lock; who has it copies shard after shard, the others look
what is there. A file has its final name when its length and xxh3-128 were found to be the manifest's, and a shard is
there with its tar, the last of its files. A dead copier's lock is taken over, its unfinished files are removed, and its
finished ones stay. Nothing here can end a run: what cannot be copied is read from the shared folder, as all of it is
until then, and one line says so. Copies that are in no manifest's folder are neither used nor removed.
"""

import contextlib
import errno
import logging
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pipeline.read import ReadStats, retried
from shards.atomic import atomic_file, remove_temporary
from shards.digest import HashingFile
from shards.errors import InputError
from shards.lock import Held, exclusive
from shards.schema import FileInfo, Manifest, ShardInfo

log = logging.getLogger("shardclip")
SUFFIXES = ("idx", "parquet", "tar")
"""In this order: with the last one a shard is complete."""
RETRY_S = 2.0
"""Seconds between tries for a lock that another process has."""
SPARE = 0.05
"""Share of the node's file system that stays free; a full one would hurt others."""
_PIECE = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})
"""What the node's disk says that will be no better with the next shard."""


class _Stopped(Exception):
    """The loader was closed."""


class Stage:
    """Copies of one split's shards, and, in one process of the node, their making."""

    def __init__(
        self, root: Path, folder: Path, manifest: Manifest, shards: tuple[ShardInfo, ...], limit: int | None = None
    ) -> None:
        """`root`: the shared folder; `folder`: one on the node; `limit`: most bytes of this set's copies there.

        InputError where `folder` is a file or lies in one, which is a slip; all else may pass, and the thread says it.
        """
        self.root = Path(folder) / f"shardclip-{manifest.digest}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"stage_dir {folder} is no folder, nor can it be made; give another") from None
        except OSError:
            pass
        self._shared, self._shards, self._limit = Path(root), shards, limit
        self._stats = ReadStats()
        self._there: set[int] = set()
        self._distrusted: set[int] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shardclip-stage", daemon=True)
        self._thread.start()

    def has(self, number: int) -> bool:
        """Whether a shard's copy is there, whole, and can be used."""
        if number in self._distrusted:
            return False
        if number not in self._there and (self.root / f"{self._shards[number].name}.tar").exists():
            self._there.add(number)
        return number in self._there

    def distrust(self, number: int, why: str) -> None:
        """Read a shard from the shared folder from now on; its copy goes, so that a later run makes a new one."""
        if number in self._distrusted:
            return  # another thread said so
        self._distrusted.add(number)
        name = self._shards[number].name
        log.warning("the copy of shard %s in %s is read no more (%s)", name, self.root.parent, why)
        for suffix in reversed(SUFFIXES):
            with contextlib.suppress(OSError):
                (self.root / f"{name}.{suffix}").unlink()

    def count(self) -> int:
        """Shards that are there."""
        return sum(self.has(number) for number in range(len(self._shards)))

    def close(self, wait_s: float = 10.0) -> None:
        """Stop copying. A copy that hangs is left behind."""
        self._stopped.set()
        self._thread.join(wait_s)

    def _run(self) -> None:
        try:
            self._copy_in_turn()
        except _Stopped:
            pass
        except (OSError, InputError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            done = f"{self.count()} of {len(self._shards)} shards"
            log.warning("no more copies of shards in %s, %s are there (%s)", self.root.parent, done, reason)

    def _copy_in_turn(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        while not self._complete():
            try:
                with exclusive(self.root / ".lock", f"another process copies shards to {self.root}"):
                    remove_temporary(self.root)
                    self._copy_missing()
                return
            except Held:
                if self._stopped.wait(RETRY_S):
                    return

    def _complete(self) -> bool:
        return self.count() + len(self._distrusted) >= len(self._shards)

    def _copy_missing(self) -> None:
        for number, shard in enumerate(self._shards):
            if not self.has(number) and number not in self._distrusted:
                self._check_room(shard)
                try:
                    self._copy(shard)
                except (OSError, InputError) as error:
                    if isinstance(error, OSError) and error.errno in _FULL:
                        raise
                    reason = error.strerror if isinstance(error, OSError) else str(error)
                    log.warning("shard %s is not copied to %s (%s)", shard.name, self.root.parent, reason)

    def _check_room(self, shard: ShardInfo) -> None:
        """InputError where a shard would leave too little, before any of it is written."""
        needed = sum(getattr(shard, suffix).bytes for suffix in SUFFIXES)
        # Not what begins with a dot: drafts of the lock, by processes that want it, go between a look and the next.
        used = sum(path.stat().st_size for path in self.root.glob("[!.]*"))
        if self._limit is not None and used + needed > self._limit:
            raise InputError(f"the limit of {self._limit / 1e9:g} GB is reached; raise stage_gb")
        disk = shutil.disk_usage(self.root)
        if disk.free - needed < SPARE * disk.total:
            raise InputError(f"{disk.free / 1e9:.1f} GB are free there, {SPARE:.0%} of the disk stay so")

    def _copy(self, shard: ShardInfo) -> None:
        for suffix in SUFFIXES:
            name = f"{shard.name}.{suffix}"
            # Not durable: a node that loses power loses the run, and a reader checks what it reads.
            with atomic_file(self.root / name, durable=False) as target:
                retried(partial(self._copy_file, self._shared / name, target, getattr(shard, suffix)), self._stats)

    def _copy_file(self, source: Path, file: BinaryIO, info: FileInfo) -> None:
        """Copy the whole; InputError where it is not the file of the manifest."""
        file.seek(0)
        file.truncate()
        target = HashingFile(file)
        with open(source, "rb", buffering=0) as shared:
            while target.written <= info.bytes and (piece := shared.read(_PIECE)):
                if self._stopped.is_set():
                    raise _Stopped
                target.write(piece)
        if target.written != info.bytes or target.digest.hex() != info.xxh3:
            raise InputError(f"{source.name} is not the file that the manifest describes")
