"""One holder at a time, on any node: a lock file that only one can make, kept warm by a heartbeat.

`flock` may not reach other nodes of a parallel file system; links (or O_EXCL) and renames do. A holder whose process is
gone (same machine and boot) or whose heartbeat stopped (elsewhere) is dead. Its lock is replaced by who holds the lock
on doing that: were it removed first, two could come to hold it. How old a heartbeat is, the clock of the file system
says that stamps it.
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

from xxhash import xxh3_128_hexdigest

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
    lease = Lease(path=path, holder=_me())
    seen = _Heartbeat()
    deadline = time.monotonic() + wait_s
    while (now := _create(lease)) is not None:
        try:
            if _take_over(lease, taken, seen.still_s if wait_s else lambda mtime_ns: (now - mtime_ns) / 1e9):
                break
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


def _me() -> bytes:
    """What a lock file says: who holds it, and something that no other says."""
    me = {"host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid(), "started": _started(os.getpid())}
    return json.dumps({**me, "lease": uuid.uuid4().hex}).encode()


def _create(lease: Lease) -> int | None:
    """Make the lock file with its content in one step: who is killed on the way must not leave a lock of nobody's.

    None where it is ours now; else what time it is, in ns, by the clock that stamps files there.
    """
    with _draft(lease) as (draft, now):
        try:
            os.link(draft, lease.path)
        except OSError as error:
            if _says(lease.path, lease.holder):  # NFS asked twice, and tells of the second time
                return None
            if isinstance(error, FileExistsError) or not _create_empty(lease):  # no hard links there
                return now
    return None


@contextlib.contextmanager
def _draft(lease: Lease) -> Iterator[tuple[Path, int]]:
    """A lock file under another name, for the block, and when it was written, in ns."""
    draft = lease.path.with_name(f"{TEMPORARY_PREFIX}{lease.path.name}.{uuid.uuid4().hex}")
    try:
        with open(draft, "wb") as file:
            file.write(lease.holder)
            file.flush()
            os.fsync(file.fileno())  # the server's time, not ours
            now = os.fstat(file.fileno()).st_mtime_ns
        yield draft, now
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _says(path: Path, holder: bytes) -> bool:
    """Whether a lock file is there, with that content."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes() == holder
    return False


def _create_empty(lease: Lease) -> bool:
    try:
        handle = os.open(lease.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(handle, "wb") as file:
            file.write(lease.holder)
    except OSError:  # a full disk; nobody's lock would stand for a minute
        lease.path.unlink()
        raise
    return True


def _take_over(lease: Lease, taken: str, age_of: Callable[[int], float]) -> bool:
    """Whether the lock is ours now; Held where its holder lives, or where another is taking it over.

    `age_of`: from a time of change, in ns, how many seconds ago that was.
    """
    path = lease.path
    try:
        # Opened, for that is when NFS asks the server how old the file is.
        with open(path, "rb") as file:
            content, age = file.read(), age_of(os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return False  # released in this moment
    holder = _read_holder(content)
    if _is_alive(holder, age):
        raise Held(
            f"{taken}: process {holder.get('pid')} on {holder.get('host')}, last seen {max(0.0, age):.0f} s ago; "
            "wait for it, or choose another folder"
        )
    with exclusive(path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{xxh3_128_hexdigest(content)}"), taken):
        return _says(path, content) and _replace(lease)


def _read_holder(content: bytes) -> dict:
    """Nothing where the file says nothing, or not yet."""
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _replace(lease: Lease) -> bool:
    with _draft(lease) as (draft, _):
        try:
            os.replace(draft, lease.path)
        except OSError:
            if not _says(lease.path, lease.holder):
                raise
    return True


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
    """When a process started, in ticks since boot, for its number may be another's by now; None where there is none.

    One that ended is none, although nobody has asked yet how: in a container perhaps nobody ever will. A thread of it
    that still hangs in a write may end that.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")  # its name may be cut in a letter
        state, *fields = line.rpartition(")")[2].split()
        return None if state in "ZX" and int(fields[16]) <= 1 else fields[18]
    except (OSError, IndexError, ValueError):
        return None


def _boot_id() -> str:
    """Changes at every start of the machine, so that a process number of an earlier one is not believed."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
