"""Who takes part: the processes of one run, what they say to each other on the host, and signals from outside.

Gradients and features travel by DDP and the objective. What passes here are small CPU tensors over gloo, also on a GPU
machine, so that asking "does anyone want to stop?" never waits for a device.
"""

import contextlib
import datetime
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.batch import World
from shards.errors import InputError
from shards.processes import die_with_parent
from train.commandline import started_ranks

Result = TypeVar("Result")

TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among those of the run. With `size` 1 no process group is needed, and every method is local."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number on this machine; chooses the GPU."""
    local_size: int = 1
    """Processes on this machine; they share its CPUs."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes files and talks."""
        return self.rank == 0

    def world(self, device: torch.device) -> World:
        """What the loader has to know of it."""
        return World(rank=self.rank, size=self.size, device=device, local_size=self.local_size)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank; the same answer on all."""
        return self.sums([float(flag)])[0] > 0

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor of every rank, in rank order. Shape and dtype have to be the same on all."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return parts

    def gather_objects(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sums([0.0])


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun started (they find each other by its environment), or be alone without it."""
    size = started_ranks()
    if size == 1:
        yield Ranks()
        return
    ranks = Ranks(
        rank=int(os.environ["RANK"]),
        size=size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_size=int(os.environ["LOCAL_WORLD_SIZE"]),
    )
    end_with_parent()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield ranks
    except SystemExit:
        # All ranks leave together here. Without this, gloo's threads may abort the process after its exit code was set.
        dist.destroy_process_group()
        raise
    except RuntimeError as error:
        # The other rank's own message says why it went; a traceback of ours would bury it.
        if "gloo" not in str(error) or "peer" not in str(error):
            raise
        if first_to_tell():
            sys.stderr.write(f"rank {ranks.rank}: another rank ended, so this one stops; its message says why\n")
        raise SystemExit(1) from None
    dist.destroy_process_group()


def connect(timeout_s: float) -> dist.Store:
    """A connection of its own to the store by which torchrun's processes find each other."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=timeout_s))
    return dist.PrefixStore(f"shardclip/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def first_to_tell(store: dist.Store | None = None) -> bool:
    """Whether no other rank has said yet why the run ends: it is said once."""
    try:
        return (store or connect(timeout_s=2)).add("told", 1) == 1
    except RuntimeError:
        return True  # the store has gone; twice is better than never


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent dies; end at once where it has died already.

    A torchrun that is killed outright leaves its workers running (measured with torch 2.14): they would wait for each
    other, or go on writing to the run's folder beside those that are started next.
    """
    die_with_parent(signal.SIGTERM)
    init = Path("/proc/1/cmdline").read_bytes()
    if os.getppid() == 1 and "TORCHELASTIC_RUN_ID" in os.environ and b"torch" not in init:
        raise SystemExit(1)


def tell(ranks: Ranks, text: str) -> None:
    """A line on stderr, from rank 0 alone."""
    if ranks.first:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def together(ranks: Ranks, prog: str, build: Callable[[], Result]) -> Result:
    """Run `build`, which must not talk to other ranks, on every rank.

    An InputError on any of them is printed once, by rank 0, and ends all with exit code 2: torchrun kills the others as
    soon as one is gone, so that the line would be lost if each printed its own and left.
    """
    result: Result | None = None
    mistake = None
    try:
        result = build()
    except InputError as error:
        mistake = " ".join(str(error).split())
    mistakes = [text for text in ranks.gather_objects(mistake) if text is not None]
    if mistakes:
        if ranks.first:
            sys.stderr.write(f"{prog}: {mistakes[0]}\n")
            sys.stderr.flush()
        ranks.barrier()
        raise SystemExit(2)
    return result  # type: ignore[return-value]


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


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
