"""One process of a run, from joining the others to the last checkpoint: build, run, close."""

import contextlib
import io
from collections.abc import Callable, Iterator

from shards.lock import Lease
from train.alive import watching
from train.config import TrainConfig
from train.device import memory_named
from train.job import build_job, build_setting, prepare_folder
from train.loop import run
from train.ranks import Ranks, StopRequest, joined, together
from train.resume import agree_on_checkpoint
from train.rundir import WAIT_S, leased
from train.tracking import lasting_output

LESS = "try --accumulate 2 or 4, --activation-checkpointing, or a smaller --batch-size"


def train(prog: str, parsed: Callable[[], TrainConfig]) -> None:
    """Take part in the run of the config that `parsed` gives. Its InputError, and any other, is told once, as `prog`'s,
    and ends all ranks with exit code 2.
    """
    with lasting_output(), joined() as ranks, memory_named(LESS), StopRequest().listening() as stop:
        with contextlib.nullcontext() if ranks.first else contextlib.redirect_stdout(io.StringIO()):  # help comes once
            config = together(ranks, prog, parsed)
        setting = together(ranks, prog, lambda: build_setting(config, ranks))
        with _folder(prog, config, ranks) as lease:
            checkpoint = agree_on_checkpoint(config, setting.folder, setting.fingerprint, ranks, prog=prog)
            job = together(ranks, prog, lambda: build_job(setting, checkpoint, lease))
            with job.loader:
                together(ranks, prog, lambda: prepare_folder(job))
                with watching(ranks, config.rank_timeout_s):
                    run(job, stop)


@contextlib.contextmanager
def _folder(prog: str, config: TrainConfig, ranks: Ranks) -> Iterator[Lease | None]:
    """Hold the run's folder, which rank 0 alone does."""
    with contextlib.ExitStack() as held:

        def hold() -> Lease | None:
            wait_s = WAIT_S if config.resume == "auto" else 0.0
            return held.enter_context(leased(config.out, wait_s=wait_s)) if ranks.first else None

        yield together(ranks, prog, hold)
