"""`python -m train.lead_time RUN`: seconds that a run needs between a signal and its last checkpoint on disk.

A signal that comes at the worst moment finds a validation just begun and a save before it still being written: step,
validation, and two saves, as RUN/metrics.jsonl has measured them lately, twice over. Used by slurm/train.sbatch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from shards.cli import main_guard, parse, say
from train.rows import Row, is_number, read_rows

PROG = "train.lead_time"
UNKNOWN_S = 120.0
"""Before anything was measured."""
LEAST_S = 20.0
"""For what is not measured: processes that wake, a node under load."""
_RECENT = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class LeadConfig:
    """Print how many seconds before its end a run has to be told to save."""

    run: Positional[Path]
    """Folder of the run; it need not be there yet."""


def lead_time(rows: Sequence[Row]) -> float:
    """Seconds, from rows of metrics; UNKNOWN_S where no save was measured."""
    if not any("save_s" in row for row in rows):
        return UNKNOWN_S
    save, validation, step = (_worst(rows, name) for name in ("save_s", "validate_s", "step_ms"))
    return 2 * (2 * save + validation + step / 1000) + LEAST_S


def _worst(rows: Sequence[Row], name: str) -> float:
    return max([row[name] for row in rows if is_number(row.get(name))][-_RECENT:], default=0.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a whole number of seconds."""
    with main_guard(PROG):
        run = parse(LeadConfig, argv, prog=PROG).run
        say(str(round(lead_time(read_rows(run / "metrics.jsonl")))))


if __name__ == "__main__":
    main()
