"""Put files out of the page cache, and look whether they are: `posix_fadvise` asks, `mincore` tells.

The kernel's page cache only. What a storage server, a disk or a virtual machine's host keeps is out of reach; so is the
cache of a file system that has its own, as GPFS has (pagepool).
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

from shards.errors import InputError

MOST_RESIDENT = 0.01
"""Share of the bytes that may still be in the page cache for a run to count as cold."""
_STRETCH = 1 << 30
"""Bytes mapped at once; a multiple of any page size."""
_PROT_READ, _MAP_SHARED = 1, 1


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
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    at = libc.mmap(None, size, _PROT_READ, _MAP_SHARED, descriptor, offset)
    if at == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        found = ctypes.create_string_buffer(-(-size // page))
        if libc.mincore(at, size, found):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        libc.munmap(at, size)
    return sum(byte & 1 for byte in found.raw)
