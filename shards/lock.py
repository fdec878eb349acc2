"""One holder at a time, on any node: a lock file made with O_EXCL, kept warm by a heartbeat.

`flock` may not reach other nodes of a parallel file system; O_EXCL and rename do. A holder whose process is gone (same
machine and boot) or whose heartbeat stopped (elsewhere) is dead, and its lock is taken over by renaming it away, which
only one can do.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from shards.errors import InputError

HEARTBEAT_S = 5.0
DEAD_AFTER_S = 60.0
"""Twelve heartbeats: a parallel file system that stalls for a minute is worse than a wait of one."""


class Held(InputError):
    """Somebody else holds the lock and is alive."""


@contextlib.contextmanager
def exclusive(path: Path, taken: str) -> Iterator[None]:
    """Hold the lock file `path` inside the block. Held where another has it: says `taken`, host and process."""
    me = {"host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid(), "started": _started(os.getpid())}
    holder = json.dumps(me).encode()
    while not _create(path, holder):
        _take_over_or_refuse(path, taken)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, stop), name="lock-heartbeat", daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        path.unlink(missing_ok=True)


def _create(path: Path, holder: bytes) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with open(handle, "wb") as file:
        file.write(holder)
    return True


def _take_over_or_refuse(path: Path, taken: str) -> None:
    try:
        age = time.time() - path.stat().st_mtime
        holder = json.loads(path.read_bytes() or b"{}")
    except FileNotFoundError:
        return  # released in this moment
    except ValueError:
        holder = {}
    if _is_alive(holder, age):
        raise Held(
            f"{taken}: process {holder.get('pid')} on {holder.get('host')}, last seen {age:.0f} s ago; wait for it, or "
            "choose another folder"
        )
    with contextlib.suppress(FileNotFoundError):  # somebody else was faster
        grave = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        path.rename(grave)
        grave.unlink()


def _is_alive(holder: dict, age: float) -> bool:
    if holder.get("host") == socket.gethostname() and holder.get("boot") == _boot_id():
        started = _started(holder.get("pid"))
        return started is not None and started == holder.get("started", started)
    return age < DEAD_AFTER_S


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)


def _started(pid: object) -> str | None:
    """When a process started, in ticks since boot, for its number may be another's by now; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _boot_id() -> str:
    """Changes at every start of the machine, so that a process number of an earlier one is not believed."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
