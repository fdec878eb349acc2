"""How far a run is: a bar on a terminal, a line now and then elsewhere; both with loss, films/s, wait and time left."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm

from shards.cli import say

Row = dict[str, Any]


class ProgressDisplay:
    """What a person sees of a run while it goes on."""

    def __init__(self, *, steps: int, done: int, line_every: int) -> None:
        """`done`: steps of an earlier start. `line_every`: steps between lines where stderr is no terminal."""
        self._steps, self._done, self._line_every = steps, done, line_every
        self._step = self._said = done
        self._begin = time.monotonic()
        self._bar = tqdm(
            total=steps,
            initial=done,
            disable=not sys.stderr.isatty(),
            bar_format="step {n_fmt}/{total_fmt} |{bar}| {postfix}  {remaining} left",
        )

    def advance(self) -> None:
        """One more step is done."""
        self._step += 1
        self._bar.update()

    def show(self, row: Row) -> None:
        """Show a row of metrics."""
        if not self._bar.disable:
            self._bar.set_postfix_str(summary(row))
        elif self._is_due(row):
            self._said = row["step"]
            say(f"step {row['step']}/{self._steps}  {summary(row)}  {clock(self.seconds_left())} left")

    def seconds_left(self) -> float:
        """Estimate from all that was done since this start, validations and saves included."""
        done = max(1, self._step - self._done)
        return (time.monotonic() - self._begin) / done * (self._steps - self._step)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def _is_due(self, row: Row) -> bool:
        first, last = self._said == self._done, row["step"] >= self._steps
        return first or last or "val_loss" in row or row["step"] - self._said >= self._line_every


def summary(row: Row) -> str:
    """A row in a few words: loss, learning rate, films/s, share of the step that waited for the loader."""
    parts = [f"loss {_number(row.get('loss'))}"]
    if "lr" in row:
        parts.append(f"lr {row['lr']:.2e}")
    if "images_per_s" in row:
        parts.append(f"{row['images_per_s']:,.0f} films/s")
    if row.get("step_ms"):
        parts.append(f"step {row['step_ms']:,.0f} ms, {100 * row['loader_wait_ms'] / row['step_ms']:.1f} % wait")
    if "val_loss" in row:
        parts.append(f"validation loss {_number(row['val_loss'])}")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 where it is less than an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside the block nothing that is said ends the run: neither a reader that has gone, as `| head` does, nor a full
    disk under a log. What stdout or stderr does not take is dropped, and all that comes after it."""
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        if stream is not None:
            setattr(sys, name, _Lasting(stream))
    try:
        yield
    finally:
        for name, stream in streams.items():
            setattr(sys, name, stream)


class _Lasting:
    """A stream whose errors are nobody's; the rest is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # from here on into nothing, what is still in the stream's buffer as well
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
