"""Worker processes that do not outlive their parent."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send signal `number` to this process when its parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def keep_memory() -> None:
    """Have malloc keep what is freed for the next use: a page from the kernel costs 2 to 10 us on a virtual machine.

    Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most it takes
        mallopt(_M_ARENA_MAX, 1)  # what one thread frees is for all


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back inside the block: a worker that starts in it is not hit while it imports, and says nothing."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(parent: int) -> None:
    """Initializer of a pool's workers: leave Ctrl-C to the parent, which says so, and die with it."""
    keep_memory()
    sys.setswitchinterval(0.0005)  # its threads wait for disks: 5 ms for the interpreter is more than a disk takes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # what `interrupts_held` left
    die_with_parent()
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
