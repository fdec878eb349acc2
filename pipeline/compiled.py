"""numba's compiler, kept from failing where it could only be slower."""

from collections.abc import Callable
from typing import Any

from numba import config, njit


def compiled(function: Callable[..., Any], signature: Any) -> Callable[..., Any]:
    """The function as machine code, which holds no GIL; from numba's cache on disk where that is possible.

    Not so where neither the source's folder nor the user's cache folder takes files (RuntimeError), a disk is full
    (OSError) or a cached file is damaged (whatever unpickling says): then it is compiled for this process alone.
    NUMBA_CACHE_DIR names another folder. Entries are written under a temporary name and are per CPU model, so that
    processes and machines may share one.
    """
    if vars(config)["DISABLE_JIT"]:
        raise RuntimeError("NUMBA_DISABLE_JIT is set")
    try:
        return njit(signature, nogil=True, cache=True)(function)
    except Exception:
        return njit(signature, nogil=True)(function)
