"""A file system that behaves like GPFS, Lustre or NFS at their worst: a folder passed through FUSE, with faults.

    python tests/fuse_storage.py BACKING MOUNT '{"links": false, "rules": [["read", "\\.tar$", "EIO", 0, 3]]}'

Tests call `mounted`. Two mounts of one BACKING are two nodes. Hard links, locks, direct transfers and the like are
there or not; a rule makes calls of one kind fail, hang, or report a failure after they have succeeded, as NFS does when
it asks again for what was done. An open file that is removed keeps a name in its folder (libfuse's `.fuse_hidden...`,
as NFS's `.nfs...`). There is no fallocate and no xattr, ever; F_SETFL is the kernel's, which refuses nothing here.
"""

import contextlib
import errno
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

Rule = tuple[str, str, str, int, int]
"""Call (`open`, `read`, `write`, `sync`, `close`, `rename`, `link`, `unlink`, `stat`, `list`, `sync_folder`, ...), what
its path has to match, what comes of it, how many such calls pass before, and how many it then befalls (-1: all).

What comes of it: an error's name (`EIO`); `done EIO`, where the call succeeds before; `hang 2.5`, seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """How a mount behaves; by default as a good file system."""

    direct: str = "yes"
    """O_DIRECT: `yes`; refused at `open`; refused at the first `transfer`; or only at one that is no multiple of
    `alignment`."""
    alignment: int = 512
    """Of direct transfers."""
    links: bool = True
    """Hard links."""
    locks: bool = True
    """flock and fcntl; else ENOLCK."""
    sync_folders: bool = True
    """fsync of a folder; else EINVAL."""
    steady_inodes: bool = True
    """Else another number at every look."""
    whole_seconds: bool = False
    """Times without fractions."""
    clock_s: float = 0.0
    """By how much the server's clock is ahead."""
    most_bytes: int = 0
    """Of one read or write, which are then short; 0: as many as asked for."""
    quota: int = 0
    """Bytes that may be written through this mount before EDQUOT; 0: any number."""
    cache_s: float = 0.0
    """For how long names, absences, sizes and times are remembered: what other nodes do is seen that much later."""
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """A mounted file system."""

    root: Path
    log: Path
    daemon: int
    """Process that serves it; when killed, all calls fail with ENOTCONN."""

    def fired(self) -> Counter[str]:
        """How often each fault has struck: a test that saw none has shown nothing."""
        return Counter(self.log.read_text().splitlines())


def reason_to_skip() -> str | None:
    """Why there is no FUSE here; None where there is."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no /dev/fuse"
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as error:  # the binding, or libfuse itself (Debian: libfuse3-3, fuse3)
        return f"no FUSE library ({error})"
    return None


@contextlib.contextmanager
def mounted(backing: Path, root: Path, **faults: Any) -> Iterator[Mount]:
    """`backing` seen at `root`, both made where missing, until the block ends. Skips the test where it cannot be."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    for folder in (backing, root):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as logs:
        log, said = Path(logs, "fired"), Path(logs, "stderr")
        log.touch()
        command = [sys.executable, __file__, backing, root, json.dumps(asdict(Faults(**faults))), log]
        with open(said, "wb") as stderr:
            daemon = subprocess.Popen([str(part) for part in command], stderr=stderr)
        try:
            _await_mount(daemon, root, said)
            yield Mount(root=root, log=log, daemon=daemon.pid)
        finally:
            _unmount(root)
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
            daemon.kill()
            daemon.wait()


def _unmount(root: Path) -> None:
    for command in (["fusermount3", "-u", "-z"], ["umount", "-l"]):  # even where somebody is in it, or the daemon dead
        with contextlib.suppress(FileNotFoundError):
            if not subprocess.run([*command, str(root)], stderr=subprocess.DEVNULL).returncode:
                return


def _await_mount(daemon: subprocess.Popen, root: Path, said: Path) -> None:
    while not os.path.ismount(root):
        if daemon.poll() is not None:
            pytest.skip(f"FUSE does not mount here ({said.read_text().strip()[-200:]})")
        time.sleep(0.02)


def _serve(backing: str, root: str, settings: str, log: str) -> None:
    """Be the file system until it is unmounted."""
    import mfusepy

    class Storage(_Storage, mfusepy.Operations):
        use_ns = True

    faults = Faults(**json.loads(settings))
    storage = Storage(backing, faults, log)
    if faults.locks:  # the kernel's own
        del storage.flock, storage.lock
    seconds = dict.fromkeys(("entry_timeout", "attr_timeout", "negative_timeout"), faults.cache_s)
    short = {"direct_io": True} if faults.most_bytes else {}  # through the page cache a short read is an end of file
    mfusepy.FUSE(storage, root, raw_fi=True, foreground=True, use_ino=True, fsname="faulty", **short, **seconds)


class _Storage:
    """FUSE's calls, passed on to a folder. libfuse has them come in several threads."""

    def __init__(self, backing: str, faults: Faults, log: str) -> None:
        self._backing, self._faults = os.path.realpath(backing), faults
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND)
        self._seen = [0] * len(faults.rules)
        self._written = self._looks = 0
        self._lock = threading.Lock()
        self.flock = self.lock = self._no_locks

    def _note(self, what: str) -> None:
        os.write(self._log, f"{what}\n".encode())

    def _refuse(self, number: int, what: str) -> None:
        self._note(what)
        raise OSError(number, os.strerror(number))

    def _do(self, call: str, path: str, action: Callable[[], Any]) -> Any:
        """What `action` returns, unless a rule has it otherwise."""
        for index, (wanted, pattern, outcome, skip, times) in enumerate(self._faults.rules):
            if wanted != call or not re.search(pattern, path):
                continue
            with self._lock:
                self._seen[index] += 1
                hit = skip < self._seen[index] and (times < 0 or self._seen[index] <= skip + times)
            if not hit:
                continue
            kind, _, value = outcome.partition(" ")
            if kind == "hang":
                self._note(f"{call} hang")
                time.sleep(float(value))
                continue
            if kind == "done":
                action()
            self._refuse(getattr(errno, value or kind), f"{call} {outcome}")
        return action()

    def _at(self, path: str) -> str:
        return self._backing + path

    def _no_locks(self, *_: Any) -> None:
        self._refuse(errno.ENOLCK, "lock ENOLCK")

    def getattr(self, path: str, handle: Any = None) -> dict[str, Any]:
        status = self._do("stat", path, lambda: os.lstat(self._at(path)) if handle is None else os.fstat(handle.fh))
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_ino")
        found = {name: getattr(status, name) for name in names}
        for name in ("st_atime", "st_mtime", "st_ctime"):
            at = getattr(status, f"{name}_ns") + int(self._faults.clock_s * 1e9)
            found[name] = at - at % 1_000_000_000 if self._faults.whole_seconds else at
        if not self._faults.steady_inodes:
            with self._lock:
                self._looks += 1
                found["st_ino"] += self._looks << 32
        return found

    def open(self, path: str, info: Any) -> int:
        self._check_direct(info.flags)
        wanted = info.flags & ~(os.O_DIRECT | os.O_APPEND)
        info.fh = self._do("open", path, lambda: os.open(self._at(path), wanted))
        return 0

    def create(self, path: str, mode: int, info: Any) -> int:
        self._check_direct(info.flags)
        wanted = info.flags & ~(os.O_DIRECT | os.O_APPEND) | os.O_CREAT
        info.fh = self._do("create", path, lambda: os.open(self._at(path), wanted, mode))
        return 0

    def _check_direct(self, flags: int) -> None:
        if flags & os.O_DIRECT and self._faults.direct == "open":
            self._refuse(errno.EINVAL, "direct open")

    def _check_transfer(self, info: Any, offset: int, size: int) -> None:
        if not info.flags & os.O_DIRECT:
            return
        odd = offset % self._faults.alignment or size % self._faults.alignment
        if self._faults.direct == "transfer" or (odd and self._faults.direct == "alignment"):
            self._refuse(errno.EINVAL, "direct transfer")
        self._note("direct taken")

    def read(self, path: str, size: int, offset: int, info: Any) -> bytes:
        self._check_transfer(info, offset, size)
        size = self._shortened("read", size)
        return self._do("read", path, lambda: os.pread(info.fh, size, offset))

    def write(self, path: str, content: bytes, offset: int, info: Any) -> int:
        self._check_transfer(info, offset, len(content))
        content = content[: self._shortened("write", len(content))]
        with self._lock:
            self._written += len(content)
        if 0 < self._faults.quota < self._written:
            self._refuse(errno.EDQUOT, "write EDQUOT")
        return self._do("write", path, lambda: os.pwrite(info.fh, content, offset))

    def _shortened(self, call: str, size: int) -> int:
        most = self._faults.most_bytes
        if not 0 < most < size:
            return size
        self._note(f"short {call}")
        return most

    def truncate(self, path: str, length: int, _info: Any = None) -> None:
        self._do("truncate", path, lambda: os.truncate(self._at(path), length))

    def flush(self, path: str, _info: Any) -> None:
        self._do("close", path, lambda: None)

    def release(self, _path: str, info: Any) -> None:
        os.close(info.fh)

    def fsync(self, path: str, _only_data: int, _info: Any) -> None:
        self._do("sync", path, lambda: None)  # no test cuts the power

    def fsyncdir(self, path: str, _only_data: int, _info: Any) -> None:
        if not self._faults.sync_folders:
            self._refuse(errno.EINVAL, "sync_folder EINVAL")
        self._do("sync_folder", path, lambda: None)

    def readdir(self, path: str, _info: Any) -> list[tuple[str, dict[str, int], int]]:
        entries = self._do("list", path, lambda: list(os.scandir(self._at(path))))
        return [(".", {}, 0), ("..", {}, 0), *((entry.name, {"st_ino": entry.inode()}, 0) for entry in entries)]

    def mkdir(self, path: str, mode: int) -> None:
        self._do("mkdir", path, lambda: os.mkdir(self._at(path), mode))

    def rmdir(self, path: str) -> None:
        self._do("rmdir", path, lambda: os.rmdir(self._at(path)))

    def unlink(self, path: str) -> None:
        self._do("unlink", path, lambda: os.unlink(self._at(path)))

    def rename(self, old: str, new: str) -> None:
        self._do("rename", new, lambda: os.rename(self._at(old), self._at(new)))

    def link(self, new: str, old: str) -> None:
        if not self._faults.links:
            self._refuse(errno.EPERM, "link EPERM")
        self._do("link", new, lambda: os.link(self._at(old), self._at(new)))

    def symlink(self, new: str, old: str) -> None:
        self._do("symlink", new, lambda: os.symlink(old, self._at(new)))

    def readlink(self, path: str) -> str:
        return os.readlink(self._at(path))

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._at(path), mode)

    def chown(self, path: str, user: int, group: int) -> None:
        os.chown(self._at(path), user, group)

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        given = {} if times is None or times[1] == _NOW else {"ns": times}
        self._do("touch", path, lambda: os.utime(self._at(path), **given))

    def statfs(self, _path: str) -> dict[str, int]:
        found = os.statvfs(self._backing)
        names = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_frsize", "f_files", "f_ffree", "f_favail")
        return {**{name: getattr(found, name) for name in names}, "f_namemax": 255}


_NOW = (1 << 30) - 1
"""`UTIME_NOW` of <sys/stat.h>, in place of nanoseconds: by the server's clock."""

if __name__ == "__main__":
    _serve(*sys.argv[1:])
