"""`python -m train.lead_time RUN`: seconds that a run needs between a signal and its last checkpoint on disk.

A signal that comes at the worst moment finds a validation just begun and a save before it still being written: step,
validation, and two saves, as RUN/metrics.jsonl has measured them lately, twice over. Used by slurm/train.sbatch.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from shards.cli import main_guard, parse, say

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


def lead_time(rows: Sequence[dict]) -> float:
    """Seconds, from rows of metrics; UNKNOWN_S where no save was measured."""
    if not any("save_s" in row for row in rows):
        return UNKNOWN_S
    save, validation, step = (_worst(rows, name) for name in ("save_s", "validate_s", "step_ms"))
    return 2 * (2 * save + validation + step / 1000) + LEAST_S


def _worst(rows: Sequence[dict], name: str) -> float:
    return max([row[name] for row in rows if isinstance(row.get(name), int | float)][-_RECENT:], default=0.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a whole number of seconds."""
    with main_guard(PROG):
        path = parse(LeadConfig, argv, prog=PROG).run / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        say(str(round(lead_time([row for line in lines for row in _row(line)]))))


def _row(line: bytes) -> list[dict]:
    """The row of a line, none where it is none; without train.metrics, which takes seconds to load torch."""
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line)
        return [row] if isinstance(row, dict) else []
    return []


if __name__ == "__main__":
    main()
