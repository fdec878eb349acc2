"""Checkpoints written while training goes on: one thread, one file at a time, and what is kept of them.

The loop hands over a payload that changes no more and goes on; only when the one before is still being written does it
wait. A file that could not be written (a full disk, a file system gone read-only) costs nothing but itself: the older
ones stay, the next save tries anew, and the run ends when more than `retries` in a row have failed.
"""

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.atomic import TEMPORARY_PREFIX, sync_folder
from shards.errors import InputError
from train.checkpoint import DamagedCheckpoint, checkpoint_name, list_checkpoints, verify_checkpoint, write_checkpoint
from train.rundir import LeaseLost

PAUSE_S = 2.0
"""Between tries of a last save, which no later one replaces."""
GRACE_S = 30.0
"""What torchrun leaves its processes between SIGTERM and SIGKILL unless told otherwise."""


@dataclass(frozen=True, slots=True)
class _Save:
    """One payload on its way to disk."""

    payload: dict[str, Any]
    is_best: bool


class Shelf:
    """A run's checkpoint files: the newest good ones, and the best."""

    def __init__(self, folder: Path, *, keep: int, best: Path) -> None:
        """`keep`: newest good ones that stay; `best`: where the best one lies besides."""
        self._folder, self._keep, self._best = folder, keep, best
        self._good: dict[Path, tuple[int, int, int]] = {}

    def put(self, payload: dict[str, Any], *, is_best: bool, check: Callable[[], None] = lambda: None) -> None:
        """Write a checkpoint, then delete those that are no longer needed. OSError where it cannot be written.

        The best one first: whoever is killed in between trains that step again, and finds it best again.
        """
        path = self._folder / checkpoint_name(payload["step"])
        if is_best:
            write_checkpoint(self._best, payload, check=check)
        if not (is_best and _link(self._best, path)):
            write_checkpoint(path, payload, check=check)
        self._good[path] = _identity(path)
        self.prune()

    def put_best(self, payload: dict[str, Any], *, check: Callable[[], None]) -> None:
        """Write the best checkpoint alone: one that failed at its time."""
        write_checkpoint(self._best, payload, check=check)

    def prune(self) -> None:
        """Delete checkpoints older than the newest good ones, oldest first; damaged ones do not count as good."""
        good, old = 0, []
        for _, path in list_checkpoints(self._folder):
            if good == self._keep:
                old.append(path)
            else:
                good += self._is_good(path)
        for path in reversed(old):
            with contextlib.suppress(OSError):  # in use elsewhere; this one is written, the next save tries again
                path.unlink()
                self._good.pop(path, None)

    def _is_good(self, path: Path) -> bool:
        """Whether every byte was found right, now or when the file was last seen to change."""
        try:
            identity = _identity(path)
            if self._good.get(path) != identity:
                verify_checkpoint(path)
                self._good[path] = identity
        except (OSError, DamagedCheckpoint):
            return False
        return True


class CheckpointWriter:
    """Writes payloads in a thread, one at a time, in order."""

    def __init__(
        self,
        shelf: Shelf,
        *,
        retries: int,
        warn: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
        before: Path | None = None,
    ) -> None:
        """`check` raises LeaseLost where the folder is another run's by now; `before`: a file (the metrics) that must
        be on disk before a checkpoint that goes beyond it."""
        self._shelf, self._retries, self._warn, self._check, self._before = shelf, retries, warn, check, before
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[InputError | None] | None = None
        self._saving: _Save | None = None
        self._owed: _Save | None = None
        self._failed = 0
        self._figures: dict[str, float] = {}
        self._warned_slow = False

    def write(self, payload: dict[str, Any], *, is_best: bool) -> None:
        """Hand over a payload, which must not change any more; waits for the one before.

        InputError where more saves have failed in a row than may, or the folder is another run's.
        """
        begin = time.perf_counter()
        error = self._collect()
        if error is not None:
            self._failed += 1
            if self._failed > self._retries:
                raise error
            left = self._retries - self._failed
            self._warn(f"{error}; training goes on, {left} more in a row may fail (--save-retries)")
        self._submit(_Save(payload, is_best))
        self._figures["save_wait_s"] = round(time.perf_counter() - begin, 3)

    def figures(self) -> dict[str, float]:
        """Seconds, each told once: `save_s` that the last finished save took, `save_wait_s` that training waited."""
        figures, self._figures = self._figures, {}
        return figures

    def wait(self) -> None:
        """Return when all is on disk. InputError where it could not be written, `retries` more tries later."""
        while (error := self._collect()) is not None:
            self._failed += 1
            if self._failed > self._retries or self._saving is None:
                raise error
            self._warn(f"{error}; trying again")
            time.sleep(PAUSE_S)
            self._submit(self._saving)

    def close(self) -> None:
        """`wait`, then end the thread."""
        try:
            self.wait()
        finally:
            self._threads.shutdown()

    def _submit(self, save: _Save) -> None:
        self._saving = save
        self._pending = self._threads.submit(self._write, save)

    def _collect(self) -> InputError | None:
        """Wait for the pending save; why it failed. LeaseLost, which no later try mends, is raised."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        error = pending.result()
        if error is None:
            self._failed = 0
        elif isinstance(error, LeaseLost):
            raise error
        elif self._saving is not None and self._saving.is_best:
            self._owed = self._saving
        return error

    def _write(self, save: _Save) -> InputError | None:
        begin = time.perf_counter()
        payload = save.payload
        try:
            self._check()
            _sync_file(self._before)
            if self._owed is not None and not save.is_best:
                self._shelf.put_best(self._owed.payload, check=self._check)
            self._owed = None
            self._shelf.put(payload, is_best=save.is_best, check=self._check)
        except InputError as error:
            return error
        except OSError as error:
            name = checkpoint_name(payload["step"])
            return InputError(f"cannot write the checkpoint {name} ({error.strerror}); older ones are whole")
        self._saving = None  # its memory is wanted
        self._took(time.perf_counter() - begin)
        return None

    def _took(self, seconds: float) -> None:
        self._figures["save_s"] = round(seconds, 3)
        if 2 * seconds > GRACE_S and not self._warned_slow:
            self._warned_slow = True
            self._warn(
                f"a checkpoint takes {seconds:.0f} s to write, and torchrun ends its processes {GRACE_S:.0f} s after a "
                f"SIGTERM: give it --shutdown-timeout {2 * seconds + GRACE_S:.0f}"
            )


def _link(source: Path, path: Path) -> bool:
    """Give a file a second name, in one moment; whether the file system can."""
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    try:
        temporary.unlink(missing_ok=True)
        os.link(source, temporary)
        os.replace(temporary, path)
        temporary.unlink(missing_ok=True)  # where both were the same file already, replacing it did nothing
        sync_folder(path.parent)
    except OSError:
        return False
    return True


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _sync_file(path: Path | None) -> None:
    """Have what was written to a file, by whatever handle, on disk."""
    if path is None:
        return
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
