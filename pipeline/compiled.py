"""numba's compiler, kept from failing where it could only be slower."""

import platform
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, extending, njit, types
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


def emitted(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Makes what emits LLVM code, from a builder and the values of its arguments, callable by compiled code."""

    def decorate(emit: Callable[..., Any]) -> Any:
        @wraps(emit)  # its signature too, less the first argument
        def typing(_, *arguments):  # noqa: ARG001
            def generate(context, builder, signature, values):
                made = emit(builder, *values)
                return context.get_dummy_value() if signature.return_type == types.void else made

            return signature, generate

        return extending.intrinsic(typing)

    return decorate


def load(builder: ir.IRBuilder, address: Any, kind: ir.Type) -> Any:
    """What is at an address, whatever that divides by."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def stamp_of(*modules: ModuleType) -> int:
    """A number, not 0, that changes with this file and those of modules. numba's cache looks for changes at a
    function's file and at what it closes over, so one that is made of other files closes over their stamp, and uses it.
    """
    files = [__file__, *(str(module.__file__) for module in modules)]
    return xxh3_64_intdigest(b"".join(Path(file).read_bytes() for file in files)) >> 1 | 1
