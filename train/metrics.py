"""What a run says of itself: the time of its steps, and a row now and then to metrics.jsonl and all who watch."""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from shards.atomic import write_atomic
from train.config import TrainConfig
from train.progress import ProgressDisplay
from train.rundir import RunFolder
from train.tracking import Board, Guarded, Row, Sink, Wandb


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

    def __init__(self, folder: RunFolder, *, config: TrainConfig, done: int) -> None:
        """`done`: steps of an earlier start; rows beyond it, which will be trained again, are cut off."""
        self._sinks: list[Sink] = [
            JsonLines(folder.metrics, done),
            Guarded("TensorBoard", lambda: Board(folder.tensorboard, done)),
        ]
        if config.watch.wandb != "off":
            self._sinks.append(Guarded("W&B", lambda: Wandb(folder.root, config, done)))
        self._display = ProgressDisplay(steps=config.steps, done=done, line_every=config.watch.line_every)

    def advance(self) -> None:
        """One more step is done."""
        self._display.advance()

    def write(self, row: Row) -> None:
        """Record a row of plain values; it has a `step`."""
        for sink in self._sinks:
            sink.write(row)
        self._display.show(row)

    def close(self) -> None:
        """Close the files."""
        self._display.close()
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """metrics.jsonl, one object a line. A number that is none (NaN, infinite) is written as null, as JSON wants it.

    A full disk ends nothing: rows are kept until one can be written, and it is said once.
    """

    def __init__(self, path: Path, done: int) -> None:
        trim(path, done)
        self._file = open(path, "r+b", buffering=0)
        self._end = path.stat().st_size
        self._pending = b""
        self._warned = False

    def write(self, row: Row) -> None:
        """Append a row, and those that could not be written before it."""
        self._pending += _encode(row).encode()
        try:
            # At a place of its own: what a write that failed half-way left there is overwritten by the next.
            while self._pending:
                written = os.pwrite(self._file.fileno(), self._pending, self._end)
                self._end, self._pending = self._end + written, self._pending[written:]
        except OSError as error:
            if not self._warned:
                sys.stderr.write(f"warning: cannot write metrics.jsonl ({error.strerror}); rows are kept for later\n")
            self._warned = True

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line that a kill cut short, and what is no row, is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def trim(path: Path, step: int) -> None:
    """Leave the rows up to a step only, atomically."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    write_atomic(path, "".join(_encode(row) for row in rows).encode())


def memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far, MiB: the GPU's where the device is one, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _encode(row: Row) -> str:
    known = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(known, allow_nan=False) + "\n"
