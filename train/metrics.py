"""What a run says of itself: the time of its steps, a row now and then to metrics.jsonl and all who watch, and how far
it is: a bar on a terminal, a line now and then elsewhere.
"""

import contextlib
import resource
import sys
import time
from array import array
from collections.abc import Iterator

import torch
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from shards.cli import say
from shards.progress import clock, terminal_size
from train.config import TrainConfig
from train.rows import JsonLines, Row
from train.rundir import RunFolder
from train.tracking import Board, Guarded, Wandb


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


def memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far, MiB: the GPU's where the device is one, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


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
            file=sys.stderr,
            **terminal_size(),
        )
        self._above = contextlib.ExitStack()
        if not self._bar.disable:
            above = AboveBar(sys.stderr)
            self._above.enter_context(contextlib.redirect_stderr(above))
            self._above.callback(above.finish)

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
        self._above.close()

    def _left(self) -> list[str]:
        seconds = self.seconds_left()
        return [] if seconds is None else [f"{clock(seconds)} left"]

    def _is_due(self, row: Row) -> bool:
        first, last = self._said == self._done, row["step"] >= self._steps
        return first or last or "val_loss" in row or row["step"] - self._said >= self._line_every


class AboveBar(DummyTqdmFile):
    """stderr while a bar is drawn there: what anybody else writes stands above the bar, not behind it, by whole lines,
    as `print` and Python's own words on a thread that failed come in pieces. Those words, `logging` and `warnings` all
    look for sys.stderr, so nothing narrower than that has them all."""

    _buf: list[str]

    def write(self, text: str) -> None:
        """Keep what is no whole line; of two threads nothing is lost."""
        with tqdm.get_lock():
            super().write(text)

    def finish(self) -> None:
        """The bar is gone: whoever still holds this writes as without it, and what was kept is written."""
        with tqdm.get_lock():
            kept, self._buf = self._buf, []
            self._wrapped.write("".join(kept))
            self.wrapper_setattr("write", self._wrapped.write)


def summary(row: Row) -> list[str]:
    """A row in a few words: loss, films/s, share of the step that waited for the loader, those that it has."""
    parts = [f"loss {_number(row.get('loss'))}"]
    if "images_per_s" in row:
        parts.append(f"{row['images_per_s']:,.0f} films/s")
    if row.get("step_ms"):
        parts.append(f"{100 * row['loader_wait_ms'] / row['step_ms']:.1f} % wait")
    return parts


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
