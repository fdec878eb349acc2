"""One run at a time in a folder, on any node: RUN/lock, held by rank 0 while the run lasts (see `shards.lock`).

Ranks that outlive a killed torchrun save what is done and leave; a job that is queued again starts beside them. So who
goes on with a run waits for a living holder, and a holder that does not live is replaced.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from shards import lock
from shards.errors import InputError
from train.saving import LeaseLost

NAME = "lock"
WAIT_S = 90.0
"""A heartbeat that has stopped is believed to have after 60 s; what a save takes at the end of a run."""


@contextlib.contextmanager
def leased(root: Path, *, wait_s: float) -> Iterator[lock.Lease]:
    """Hold a run's folder inside the block, which is made and, where nothing was put into it, removed again.

    InputError where another run holds it for longer than `wait_s`, or it cannot be made.
    """
    made = [folder for folder in (root, *root.absolute().parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        holding = lock.exclusive(root / NAME, f"another run is writing to {root}", wait_s=wait_s)
        lease = holding.__enter__()
    except OSError as error:
        raise InputError(f"cannot write to the run's folder {root} ({error.strerror})") from None
    try:
        yield lease
    finally:
        holding.__exit__(None, None, None)
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def check_lease(lease: lock.Lease) -> None:
    """LeaseLost where another run has taken the folder over, because this process was stopped, or cut off, for long."""
    if not lease.mine():
        raise LeaseLost(
            f"{lease.path.parent} belongs to another run by now, because this one stood still for more than "
            f"{lock.DEAD_AFTER_S:.0f} s; it ends without writing more there"
        )
