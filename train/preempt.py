"""Signals that ask for an orderly end: the handler sets a flag, and the loop looks at it between steps.

Schedulers send SIGTERM before they take a node away; SIGUSR2 is for those that let one choose (NCCL may use SIGUSR1
itself); SIGHUP comes when a terminal closes, SIGINT from Ctrl-C. A second signal changes nothing, but for a second
Ctrl-C, which ends the process at once; not under torchrun, which passes on the first one that the ranks had already.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


class StopRequest:
    """Whether this process has been asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take the signals inside the block, but for those that are ignored, as SIGHUP is under nohup; the handlers of
        before come back after it."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._ask)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        alone = "TORCHELASTIC_RUN_ID" not in os.environ
        if number == signal.SIGINT and alone:
            if self.asked:
                raise KeyboardInterrupt
            with contextlib.suppress(OSError):  # not by sys.stderr, which may be in the middle of a line
                os.write(2, b"\nstopping after this step, which is saved; Ctrl-C again stops at once\n")
        self.asked = True
