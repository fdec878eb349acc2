"""numba's compiler, kept from failing where it could only be slower."""

import platform
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from llvmlite.binding import get_host_cpu_features
from numba import config, njit
from xxhash import xxh3_64_intdigest

NEEDED = ("avx2", "fma", "f16c")
"""Of an x86 CPU (any since 2013; a virtual one may hide them): without f16c LLVM ends the process, for want of a
function that rounds to half precision."""


def compiled(function: Callable[..., Any], signature: Any) -> Callable[..., Any]:
    """The function as machine code, which holds no GIL; from numba's cache on disk where that is possible.

    Not so where neither the source's folder nor the user's cache folder takes files (RuntimeError), a disk is full
    (OSError) or a cached file is damaged (whatever unpickling says): then it is compiled for this process alone.
    NUMBA_CACHE_DIR names another folder. Entries are written under a temporary name and are per CPU model, so that
    processes and machines may share one. RuntimeError where it cannot be compiled at all.
    """
    if vars(config)["DISABLE_JIT"]:
        raise RuntimeError("NUMBA_DISABLE_JIT is set")
    if platform.machine() == "x86_64" and (missing := [name for name in NEEDED if not get_host_cpu_features()[name]]):
        raise RuntimeError(f"the CPU has no {', '.join(missing)}")
    try:
        return njit(signature, nogil=True, cache=True)(function)
    except Exception:
        return njit(signature, nogil=True)(function)


def stamp_of(*modules: ModuleType) -> int:
    """A number, not 0, that changes with this file and those of modules. numba's cache looks for changes at a
    function's file and at what it closes over, so one that is made of other files closes over their stamp, and uses it.
    """
    files = [__file__, *(str(module.__file__) for module in modules)]
    return xxh3_64_intdigest(b"".join(Path(file).read_bytes() for file in files)) >> 1 | 1
