"""`torchrun -m train.main --preset tiny --shards OUT --out RUN`: parse, build, run, close."""

import contextlib
from collections.abc import Iterator, Sequence

from shards.cli import main_guard
from shards.lock import Lease
from train.alive import watching
from train.commandline import parse_config
from train.config import TrainConfig
from train.device import memory_named
from train.job import build_job, build_setting, prepare_folder
from train.loop import run
from train.ranks import Ranks, StopRequest, joined, together
from train.resume import agree_on_checkpoint
from train.rundir import WAIT_S, leased
from train.tracking import lasting_output

PROG = "train.main"
LESS = "try --accumulate 2 or 4, --activation-checkpointing, or a smaller --batch-size"


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says. Exit code 0 at the end and after an orderly stop, 2 for a user's mistake."""
    with (
        main_guard(PROG),
        lasting_output(),
        joined() as ranks,
        memory_named(LESS),
        StopRequest().listening() as stop,
    ):
        config = together(ranks, PROG, lambda: parse_config(PROG, argv))
        setting = together(ranks, PROG, lambda: build_setting(config, ranks))
        with _folder(config, ranks) as lease:
            checkpoint = agree_on_checkpoint(config, setting.folder, setting.fingerprint, ranks, prog=PROG)
            job = together(ranks, PROG, lambda: build_job(setting, checkpoint, lease))
            with job.loader:
                together(ranks, PROG, lambda: prepare_folder(job))
                with watching(ranks, config.rank_timeout_s):
                    run(job, stop)


@contextlib.contextmanager
def _folder(config: TrainConfig, ranks: Ranks) -> Iterator[Lease | None]:
    """Hold the run's folder, which rank 0 alone does."""
    with contextlib.ExitStack() as held:

        def hold() -> Lease | None:
            wait_s = WAIT_S if config.resume == "auto" else 0.0
            return held.enter_context(leased(config.out, wait_s=wait_s)) if ranks.first else None

        yield together(ranks, PROG, hold)


if __name__ == "__main__":
    main()
