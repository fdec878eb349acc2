"""Put first on PYTHONPATH by a test: counts the durable steps of a whole process tree and breaks it at the Nth.

SHARDCLIP_FAULT=KIND:N with KIND kill (the process group dies as in a power cut), enospc or eio (that one call fails);
SHARDCLIP_COUNT names a file that gains a byte at each fsync or rename of any process. With hold:NAME whoever would
give a file a name that ends so makes the file SHARDCLIP_COUNT and waits to be killed. SHARDCLIP_CLOCK=SECONDS sets the
clock that Python sees.
"""

import errno
import os
import signal
import time

_kind, _, _number = os.environ.get("SHARDCLIP_FAULT", "").partition(":")
_count = os.environ.get("SHARDCLIP_COUNT")


def _step() -> None:
    handle = os.open(_count, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, b".")
    reached = os.fstat(handle).st_size
    os.close(handle)
    if not _number or reached != int(_number):
        return
    if _kind == "kill":
        os.killpg(0, signal.SIGKILL)
    raise OSError({"enospc": errno.ENOSPC, "eio": errno.EIO}[_kind], os.strerror(errno.ENOSPC))


def _counted(function):
    def call(*arguments, **named):
        _step()
        return function(*arguments, **named)

    return call


def _held(function):
    def call(old, new, **named):
        if os.fspath(new).endswith(_number):
            os.close(os.open(_count, os.O_WRONLY | os.O_CREAT))
            while True:
                time.sleep(60)
        return function(old, new, **named)

    return call


if _kind == "hold":
    os.replace = _held(os.replace)
elif _count:
    os.fsync = _counted(os.fsync)
    os.replace = _counted(os.replace)

if _clock := os.environ.get("SHARDCLIP_CLOCK"):
    _offset = int(_clock) - time.time()
    _now = time.time
    time.time = lambda: _now() + _offset
    time.time_ns = lambda: int(time.time() * 1e9)
