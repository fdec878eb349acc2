"""One holder at a time, on any node: a lock file that only one can make, kept warm by a heartbeat.

`flock` may not reach other nodes of a parallel file system; links (or O_EXCL) and renames do. A holder whose process is
gone (same machine and boot) or whose heartbeat stopped (elsewhere) is dead, and its lock is taken over by renaming it
away, which only one can do.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.atomic import TEMPORARY_PREFIX
from shards.errors import InputError

HEARTBEAT_S = 5.0
DEAD_AFTER_S = 60.0
"""Twelve heartbeats: a parallel file system that stalls for a minute is worse than a wait of one."""


class Held(InputError):
    """Somebody else holds the lock and is alive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A lock that is held, unless it was taken over: from a holder that was stopped, or cut off, for a minute."""

    path: Path
    holder: bytes
    """What the file says while it is ours."""

    def mine(self) -> bool:
        """Whether it is still held. A file system that fails just now does not say that it is not."""
        try:
            return self.path.read_bytes() == self.holder
        except FileNotFoundError:
            return False
        except OSError:
            return True


@contextlib.contextmanager
def exclusive(path: Path, taken: str, *, wait_s: float = 0.0) -> Iterator[Lease]:
    """Hold the lock file `path` inside the block. Held where another has it: says `taken`, host and process.

    `wait_s`: seconds to wait for a living holder. Given those, a holder on another machine is dead only when its
    heartbeat was *seen* to stand still for DEAD_AFTER_S: clocks of machines and file servers differ.
    """
    me = {"host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid(), "started": _started(os.getpid())}
    lease = Lease(path=path, holder=json.dumps({**me, "lease": uuid.uuid4().hex}).encode())
    seen = _Heartbeat()
    deadline = time.monotonic() + wait_s
    while (now := _create(path, lease.holder)) is not None:
        try:
            _take_over_or_refuse(path, taken, seen.still_s if wait_s else lambda mtime_ns: (now - mtime_ns) / 1e9)
        except Held:
            if time.monotonic() >= deadline:
                raise
            time.sleep(min(1.0, wait_s))
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(lease, stop), name="lock-heartbeat", daemon=True)
    beat.start()
    try:
        yield lease
    finally:
        stop.set()
        beat.join()
        if lease.mine():
            with contextlib.suppress(OSError):  # what it was held for is done; a dead holder's lock is taken over
                path.unlink()


class _Heartbeat:
    """How long a file's time of change has stood still, by our own clock."""

    def __init__(self) -> None:
        self._mtime_ns: int | None = None
        self._since = 0.0

    def still_s(self, mtime_ns: int) -> float:
        """Seconds since `mtime_ns` was first seen."""
        if mtime_ns != self._mtime_ns:
            self._mtime_ns, self._since = mtime_ns, time.monotonic()
        return time.monotonic() - self._since


def _create(path: Path, holder: bytes) -> int | None:
    """Make the lock file with its content in one step: who is killed on the way must not leave a lock of nobody's.

    None where it is ours now; else what time it is, in ns, by the clock that stamps files there.
    """
    draft = path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(holder)
        now = draft.stat().st_mtime_ns
        return None if _link(draft, path, holder) else now
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _link(draft: Path, path: Path, holder: bytes) -> bool:
    try:
        os.link(draft, path)
    except OSError as error:
        if _says(path, holder):  # NFS asked twice, and tells of the second time
            return True
        if isinstance(error, FileExistsError):
            return False
        return _create_empty(path, holder)  # a file system without hard links
    return True


def _says(path: Path, holder: bytes) -> bool:
    """Whether a lock file is there, with that content."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes() == holder
    return False


def _create_empty(path: Path, holder: bytes) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(handle, "wb") as file:
            file.write(holder)
    except OSError:  # a full disk; nobody's lock would stand for a minute
        path.unlink()
        raise
    return True


def _take_over_or_refuse(path: Path, taken: str, age_of: Callable[[int], float]) -> None:
    """`age_of`: from a time of change, in ns, how many seconds ago that was."""
    try:
        # Opened, for that is when NFS asks the server how old the file is.
        with open(path, "rb") as file:
            content, age = file.read(), age_of(os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return  # released in this moment
    try:
        holder = json.loads(content or b"{}")
    except ValueError:
        holder = {}
    if _is_alive(holder if isinstance(holder, dict) else {}, age):
        raise Held(
            f"{taken}: process {holder.get('pid')} on {holder.get('host')}, last seen {age:.0f} s ago; wait for it, or "
            "choose another folder"
        )
    with contextlib.suppress(FileNotFoundError):  # somebody else was faster
        grave = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        path.rename(grave)
        if grave.read_bytes() != content:  # somebody else was faster, and this is theirs
            _give_back(grave, path)
        grave.unlink(missing_ok=True)


def _give_back(grave: Path, path: Path) -> None:
    """Put a living holder's lock back, unless there is another one by now."""
    try:
        os.link(grave, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            grave.rename(path)


def _is_alive(holder: dict, age: float) -> bool:
    if holder.get("host") == socket.gethostname() and holder.get("boot") == _boot_id():
        started = _started(holder.get("pid"))
        return started is not None and started == holder.get("started", started)
    return age < DEAD_AFTER_S


def _beat(lease: Lease, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):
            if lease.mine():
                os.utime(lease.path)


def _started(pid: object) -> str | None:
    """When a process started, in ticks since boot, for its number may be another's by now; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _boot_id() -> str:
    """Changes at every start of the machine, so that a process number of an earlier one is not believed."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
