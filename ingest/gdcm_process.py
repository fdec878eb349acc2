"""gdcm in a process of its own, for it aborts on damaged JPEG lossless films: that must cost the film, not the ingest.

One child a worker, started at the first film that needs it and again after a crash. It is given a compressed frame
and its numbers, nothing that names a patient; it may neither fill the memory nor leave a core file, and what it writes
to stderr goes nowhere.
"""

import atexit
import resource
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError

PATIENCE_S = 120.0
"""For one film; gdcm takes a second for a large one."""
MEMORY_BYTES = 4 << 30
"""Address space of the child; beyond it a film counts as damaged."""
DTYPES = ("|u1", "|i1", "<u2", "<i2")


class GdcmProcess:
    """The child of this process. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def decode(self, syntax: str, options: dict[str, Any], content: bytes) -> NDArray[np.integer]:
        """Stored values of one encapsulated frame, flat, by pydicom's options. ValueError where it is damaged.

        InputError where the child was killed from outside, which says nothing about the film.
        """
        with self._lock:
            reply = self._ask((syntax, options, content))
        dtype, content = reply[:8].decode().strip(), reply[8:]
        if dtype not in DTYPES:
            raise ValueError("gdcm cannot decode this frame")
        return np.frombuffer(content, dtype=dtype)

    def close(self) -> None:
        """End the child."""
        if self._connection is not None and self._child is not None:
            self._connection.close()
            self._child.kill()
            self._child.wait()
        self._connection = self._child = None

    def _ask(self, request: tuple[str, dict[str, Any], bytes]) -> bytes:
        child, connection = self._start()
        try:
            connection.send(request)
            if connection.poll(PATIENCE_S):
                return connection.recv_bytes()
        except (EOFError, OSError):
            code = child.wait()
            self.close()
            if code == -signal.SIGKILL:
                raise InputError(
                    "the process that decodes JPEG lossless was killed (out of memory?); run the command again to go "
                    "on, or with fewer --workers"
                ) from None
            raise ValueError("gdcm crashed") from None
        self.close()
        raise ValueError("gdcm does not come back")

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        if self._child is None or self._connection is None:
            mine, theirs = socket.socketpair()
            with theirs:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "ingest.gdcm_process", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            self._connection = Connection(mine.detach())
            atexit.register(self.close)
        return self._child, self._connection


def serve(connection: Connection) -> None:
    """Decode what is asked for until the other side is gone. An empty reply says that a frame is damaged."""
    from pydicom.pixels import get_decoder

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while True:
        try:
            syntax, options, content = connection.recv()
        except EOFError:
            return
        try:
            pixels, _ = get_decoder(syntax).as_array(content, decoding_plugin="gdcm", **options)
            reply = pixels.dtype.newbyteorder("<").str.encode().ljust(8) + pixels.tobytes()
        except Exception:  # a damaged frame makes pydicom and gdcm raise nearly anything
            reply = b""
        connection.send_bytes(reply)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
