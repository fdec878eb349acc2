"""`torchrun -m train.main --preset tiny --shards OUT --out RUN`: what is asked for, before the slow imports."""

import functools
from collections.abc import Sequence

from shards.cli import main_guard
from train.commandline import parse_config, started_ranks

PROG = "train.main"


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says. Exit code 0 at the end and after an orderly stop, 2 for a user's mistake."""
    with main_guard(PROG):
        parsed = functools.cache(lambda: parse_config(PROG, argv))
        if started_ranks() == 1:  # help and mistakes at once; of several ranks one speaks for all, which takes torch
            parsed()
        from train.session import train  # 3,000 modules, torch's too: seconds, more on a parallel file system

        train(PROG, parsed)


if __name__ == "__main__":
    main()
