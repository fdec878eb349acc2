"""What a run says of itself: metrics.jsonl, TensorBoard beside it, and a progress bar or a line now and then."""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shards.atomic import write_atomic
from shards.cli import say
from train.rundir import RunFolder

Row = dict[str, Any]


class Meter:
    """Times the steps since the last row: whole steps, and how long they waited for the loader."""

    def __init__(self) -> None:
        self._restart()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch."""
        begin = time.perf_counter()
        yield
        self._wait_s += time.perf_counter() - begin
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around validation and saving, which are not part of a step."""
        begin = time.perf_counter()
        yield
        self._pause_s += time.perf_counter() - begin

    def read(self) -> tuple[float, float]:
        """Milliseconds a step, and milliseconds of it that waited for the loader; starts anew."""
        steps = max(1, self._steps)
        step_ms = (time.perf_counter() - self._begin - self._pause_s) * 1e3 / steps
        wait_ms = self._wait_s * 1e3 / steps
        self._restart()
        return step_ms, wait_ms

    def _restart(self) -> None:
        self._begin = time.perf_counter()
        self._steps = 0
        self._wait_s = self._pause_s = 0.0


class MetricsLog:
    """Rank 0's record of a run. Rows are on disk as soon as they are written."""

    def __init__(self, folder: RunFolder, *, steps: int, done: int) -> None:
        """`done`: steps of an earlier start; rows beyond it, which will be trained again, are cut off."""
        trim(folder.metrics, done)
        self._file = open(folder.metrics, "a", encoding="utf-8")
        self._board = _board(folder.tensorboard, done)
        self._steps = steps
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=not sys.stderr.isatty())

    def advance(self) -> None:
        """One more step is done."""
        self._bar.update()

    def write(self, row: Row) -> None:
        """Record a row; it has a `step`."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, row["step"])
        if self._bar.disable:
            say(_line(row, self._steps))
        else:
            self._bar.set_postfix_str(f"loss {row['loss']:.3f}")

    def close(self) -> None:
        """Close the files."""
        self._bar.close()
        self._file.close()
        self._board.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def trim(path: Path, step: int) -> None:
    """Leave the rows up to a step only, atomically."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far, MiB: the GPU's where the device is one, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _board(folder: Path, done: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

    return SummaryWriter(str(folder), purge_step=done + 1)


def _line(row: Row, steps: int) -> str:
    text = (
        f"step {row['step']}/{steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['images_per_s']:.0f} films/s  "
        f"step {row['step_ms']:.0f} ms, of it waiting for the loader {row['loader_wait_ms']:.1f} ms"
    )
    return text + (f"  validation loss {row['val_loss']:.4f}" if "val_loss" in row else "")
