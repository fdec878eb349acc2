"""Worker processes that do not outlive their parent."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send signal `number` to this process when its parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def start_worker(parent: int) -> None:
    """Initializer of a pool's workers: leave Ctrl-C to the parent, which says so, and die with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
