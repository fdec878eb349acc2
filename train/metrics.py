"""What a run says of itself: the time of its steps, a row now and then to metrics.jsonl and all who watch, and how far
it is: a bar on a terminal, a line now and then elsewhere.
"""

import contextlib
import json
import math
import os
import resource
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

import torch
from tqdm import tqdm

from shards.atomic import write_atomic
from shards.cli import say
from train.config import TrainConfig
from train.rundir import RunFolder
from train.tracking import Board, Guarded, Row, Wandb


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
        self._sinks: list[JsonLines | Guarded] = [
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


def films_since(rows: list[Row]) -> int:
    """The step after which a run went on with the films of its last row (--force); 0 where it never changed them."""
    since = rows[-1].get("films_since") if rows else None
    return since if isinstance(since, int) else 0


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a figure of a row, which anybody may have written, is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


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


class ProgressDisplay:
    """What a person sees of a run while it goes on."""

    def __init__(self, *, steps: int, done: int, line_every: int) -> None:
        """`done`: steps of an earlier start. `line_every`: steps between lines where stderr is no terminal."""
        self._steps, self._done, self._line_every = steps, done, line_every
        self._said = done
        self._ends = array("d", [time.monotonic()])
        """Seconds: when this start began, and when each of its steps ended."""
        self._validated: list[str] = []
        self._bar = tqdm(
            total=steps,
            initial=done,
            disable=not sys.stderr.isatty(),
            bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc}",
            **_terminal_size(),
        )

    def advance(self) -> None:
        """One more step is done."""
        self._ends.append(time.monotonic())
        self._bar.update()

    def show(self, row: Row) -> None:
        """Show a row of metrics."""
        if not self._bar.disable:
            if "val_loss" in row:
                self._validated = [f"val {_number(row['val_loss'])}"]
            # On 80 columns all of it is seen; on fewer, what stands last is not.
            self._bar.set_description_str("  ".join([*summary(row), *self._left(), *self._validated]))
        elif self._is_due(row):
            self._said = row["step"]
            more = [f"step {row['step_ms']:,.0f} ms  lr {row['lr']:.2e}"] if "step_ms" in row and "lr" in row else []
            more += [f"validation loss {_number(row['val_loss'])}"] if "val_loss" in row else []
            say("  ".join([f"step {row['step']}/{self._steps}", *summary(row), *more, *self._left()]))

    def seconds_left(self) -> float | None:
        """Estimate from the later half of this start's steps, validations and saves between them included: what only
        the first steps do, compiling above all, tells nothing of those to come. None before there are two."""
        done = len(self._ends) - 1
        left, half = self._steps - self._done - done, done // 2
        if not left:
            return 0.0
        return (time.monotonic() - self._ends[half]) / (done - half) * left if half else None

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def _left(self) -> list[str]:
        seconds = self.seconds_left()
        return [] if seconds is None else [f"{clock(seconds)} left"]

    def _is_due(self, row: Row) -> bool:
        first, last = self._said == self._done, row["step"] >= self._steps
        return first or last or "val_loss" in row or row["step"] - self._said >= self._line_every


def _terminal_size() -> dict[str, Any]:
    """tqdm's settings of the terminal's size: as it is at any moment; what it does not say of 100 x 24, as one that a
    container, a batch job or `script` makes does not: tqdm would draw nothing there."""
    with contextlib.suppress(OSError, ValueError):
        columns, lines = os.get_terminal_size(sys.stderr.fileno())
        if not (columns and lines):
            return {"ncols": columns - 1 if columns > 1 else 100, "nrows": lines or 24}
    return {"dynamic_ncols": True}


def summary(row: Row) -> list[str]:
    """A row in a few words: loss, films/s, share of the step that waited for the loader, those that it has."""
    parts = [f"loss {_number(row.get('loss'))}"]
    if "images_per_s" in row:
        parts.append(f"{row['images_per_s']:,.0f} films/s")
    if row.get("step_ms"):
        parts.append(f"{100 * row['loader_wait_ms'] / row['step_ms']:.1f} % wait")
    return parts


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 where it is less than an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
