"""What lies below a loader: a page cache without its files (cold), or a slow file system, under any process.

Cold: `posix_fadvise` asks the kernel's page cache to let files go, `mincore` tells whether it did. What a storage
server, a disk or a virtual machine's host keeps is out of reach; so is the cache of a file system that has its own, as
GPFS has (pagepool).

Slow: `slow.c`, compiled on the spot and preloaded.

    with slow_file_system(settings, paths) as variables:
        subprocess.run(command, env=os.environ | variables)
        counts(variables)

Below Python and below every library, so that it holds for all cases alike: whoever reads one of the paths waits the
same time for the same request. What it does not model: prefetching that goes on while nobody asks (a real client's
helps whoever reads in order), caches that others filled, and what opening a file costs. A mapped file cannot be
delayed; mapping one is refused, and counted.
"""

import ctypes
import math
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shards.errors import InputError

MOST_RESIDENT = 0.01
"""Share of the bytes that may still be in the page cache for a run to count as cold."""
_STRETCH = 1 << 30
"""Bytes mapped at once; a multiple of any page size."""


def evict(paths: Sequence[Path]) -> float:
    """Share of the bytes of files, and of those in folders, that is still in memory after all was asked to go.

    InputError where it is more than MOST_RESIDENT, or where that cannot be known.
    """
    files = [file for path in paths for file in _files(path)]
    for file in files:
        _drop(file)
    total = sum(file.stat().st_size for file in files)
    share = sum(map(resident_bytes, files)) / max(total, 1)
    if share > MOST_RESIDENT:
        raise InputError(
            f"{share:.1%} of the bytes that a cold run reads are still in memory after they were evicted: another "
            "process has the files mapped, or their file system is memory itself; measure elsewhere, or without --cold"
        )
    return share


def resident_bytes(file: Path) -> int:
    """Bytes of a file that are in the page cache, in whole pages but for the last."""
    size, page = file.stat().st_size, os.sysconf("SC_PAGE_SIZE")
    if not os.access(file, os.W_OK):  # the kernel then says that all of it is
        raise InputError(
            "a cold run needs films that you may write: of other files the kernel does not say what is in memory"
        )
    descriptor = os.open(file, os.O_RDONLY)
    try:
        stretches = range(0, size, _STRETCH)
        pages = sum(_resident_pages(descriptor, at, min(_STRETCH, size - at), page) for at in stretches)
    finally:
        os.close(descriptor)
    return min(size, pages * page)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _drop(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # what has not been written stays
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _resident_pages(descriptor: int, offset: int, size: int, page: int) -> int:
    found = ctypes.create_string_buffer(-(-size // page))
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY, offset=offset) as mapped:  # ctypes wants it writable
        first = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(first), ctypes.c_size_t(size), found)
        del first
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return sum(byte & 1 for byte in found.raw)


_SOURCE = Path(__file__).with_name("slow.c")
_STATE = struct.Struct("=4Q")
_STATE_VARIABLE = "SHARDCLIP_SLOW_STATE"


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowSettings:
    """How slow."""

    latency_ms: float = 0.0
    """Wait for each request."""
    bandwidth_mb: float | None = None
    """10^6 bytes a second, shared by all processes of a case; None: no limit."""
    jitter: float = 0.0
    """Share of the latency by which it varies, evenly, to both sides."""
    readahead_kb: int = 1024
    """KiB fetched at once for a file that is read in order."""

    def __post_init__(self) -> None:
        sound = {
            "latency_ms": (0 <= self.latency_ms < math.inf, "be at least 0"),
            "bandwidth_mb": (self.bandwidth_mb is None or 0 < self.bandwidth_mb < math.inf, "be above 0"),
            "jitter": (0 <= self.jitter <= 1, "lie in [0, 1]"),
            "readahead_kb": (self.readahead_kb >= 0, "be at least 0"),
        }
        for name, (holds, wanted) in sound.items():
            if not holds:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} has to {wanted}")
        if self.jitter and not self.latency_ms:
            raise InputError(f"--jitter {self.jitter} is a share of --latency-ms, which is 0; give that too")


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Since the file system was made."""

    requests: int
    bytes: int
    refused_maps: int


@contextmanager
def slow_file_system(settings: SlowSettings | None, paths: Sequence[Path]) -> Iterator[dict[str, str]]:
    """Variables that put it under a process and its children, while the context lasts; none without settings.

    `paths`: files, or folders with all in them, that become slow. InputError where nothing can be compiled.
    """
    if settings is None:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="shardclip-slow-") as folder:
        library, state = Path(folder, "slow.so"), Path(folder, "counts")
        state.write_bytes(bytes(_STATE.size))
        _compile(library)
        earlier = [os.environ["LD_PRELOAD"]] if os.environ.get("LD_PRELOAD") else []
        yield {
            "LD_PRELOAD": ":".join([str(library), *earlier]),
            _STATE_VARIABLE: str(state),
            "SHARDCLIP_SLOW_PATHS": "\n".join(str(path.resolve()) for path in paths),
            "SHARDCLIP_SLOW_LATENCY_NS": str(round(settings.latency_ms * 1e6)),
            "SHARDCLIP_SLOW_BYTES_PER_S": str(round((settings.bandwidth_mb or 0) * 1e6)),
            "SHARDCLIP_SLOW_JITTER_PERMILLE": str(round(settings.jitter * 1000)),
            "SHARDCLIP_SLOW_READAHEAD": str(settings.readahead_kb << 10),
        }


def counts(variables: Mapping[str, str] = os.environ) -> Counts | None:
    """What was asked so far of the slow file system of an environment (this process's), if there is one."""
    state = variables.get(_STATE_VARIABLE)
    if not state:
        return None
    _, requests, size, refused = _STATE.unpack(Path(state).read_bytes())
    return Counts(requests=requests, bytes=size, refused_maps=refused)


def _compile(library: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise InputError("a slow file system needs a C compiler and there is none here; install gcc, or set CC")
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{_SOURCE.name} did not compile: {(done.stderr.strip().splitlines() or ['silent'])[0]}")
