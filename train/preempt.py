"""SIGTERM and SIGUSR2 ask for an orderly end: the handler sets a flag, and the loop looks at it between steps.

Schedulers send SIGTERM before they take a node away; SIGUSR2 is for those that let one choose (NCCL may use SIGUSR1
itself). A second signal changes nothing.
"""

import contextlib
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Whether this process has been asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take the signals inside the block; the handlers of before come back after it."""
        before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True
