"""`torchrun -m train.main --preset tiny --shards OUT --out RUN`: parse, build, run, close."""

from collections.abc import Sequence

from shards.cli import main_guard
from train.commandline import parse_config
from train.job import build_job, prepare_folder
from train.loop import run
from train.ranks import joined, together

PROG = "train.main"


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says. Exit code 0 at the end and after an orderly stop, 2 for a user's mistake."""
    with main_guard(PROG), joined() as ranks:
        config = together(ranks, PROG, lambda: parse_config(PROG, argv))
        job = together(ranks, PROG, lambda: build_job(config, ranks))
        with job.loader:
            together(ranks, PROG, lambda: prepare_folder(job))
            run(job)


if __name__ == "__main__":
    main()
