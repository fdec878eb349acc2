"""train.main's own loop, fed in turn by the live loader, by replayed batches and by one resident batch.

All turns are taken in one process on the same towers: in place of the loop's loader stands one that changes its source
between stretches and looks at the clock. Turns of a round differ in that alone:

    bare step     the step called again and again on one batch, no loop around it
    resident      the loop, the same batch each time
    replayed      the loop, a few batches that were read before and lie on the device
    live          the loop, the loader: train.main as it is, without validation and checkpoints
    loader alone  the loader, and nobody trains
"""

import contextlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

import train.loop
from pipeline.batch import Batch, World
from pipeline.loader import resolve_backend
from shards.cli import say
from train.config import TrainConfig
from train.job import Job, build_job, build_setting, prepare_folder
from train.ranks import Ranks, StopRequest
from train.step import Step, build_step

BARE, RESIDENT, REPLAYED, LIVE, ALONE = "bare step", "resident", "replayed", "live", "loader alone"
_REPLAYED = 8
"""Batches that are replayed: they fit any GPU, and no cache of a CPU holds them."""
_WARM = 4
"""Steps before each stretch, which are not counted: more than the batches that the loader has ready."""
_FOREVER = 10**9


@dataclass(slots=True)
class Turn:
    """One stretch of steps, or of batches where nobody trains."""

    steps: int
    seconds: float = 0.0
    wait_s: float = 0.0
    """Of them, waiting for a batch."""
    inside_s: float = 0.0
    """Of them, in the step that the loop calls; on a GPU, launching it."""
    cpu_s: float = 0.0
    """User and system time of this process and all its threads."""

    def row(self, batch_size: int) -> dict[str, float]:
        """What a round's JSON says of it."""
        images = self.steps * batch_size
        return {
            "steps": self.steps,
            "step_s": self.seconds / self.steps,
            "images_per_s": images / self.seconds,
            "wait_s": self.wait_s / self.steps,
            "wait_share": self.wait_s / self.seconds,
            "inside_s": self.inside_s / self.steps,
            "cpu_s_per_1000": self.cpu_s / images * 1e3,
        }


class Finished(Exception):
    """All turns are over."""


class TimedStep:
    """A step whose calls are timed; in all else the step itself."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.inside_s = 0.0

    def __call__(self, *given: Any) -> Any:
        begin = time.perf_counter()
        output = self._step(*given)
        self.inside_s += time.perf_counter() - begin
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


class TurnLoader:
    """In the place of the loop's loader: serves the turns of every round, then raises Finished."""

    def __init__(self, job: Job, names: Sequence[str], *, rounds: int, seconds: float) -> None:
        """`seconds`: about how long a turn takes."""
        self._job, self._live = job, job.loader
        self._step: TimedStep | None = None
        self._names, self._rounds, self._seconds = names, rounds, seconds
        self._bare = build_step(job.config, job.learner, job.precision, job.ranks)
        self._batches = self._serve()
        self.turns: list[dict[str, Turn]] = []
        """A round after the other."""
        self.text_length = 0
        """Tokens of the longest report of the resident batch."""

    def build_step(self, *arguments: Any) -> TimedStep:
        """For the loop, which builds its step by this name: the same step, timed."""
        self._step = TimedStep(build_step(*arguments))
        return self._step

    def __next__(self) -> Batch:
        return next(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._live, name)

    def _serve(self) -> Iterator[Batch]:
        kept = [keep(next(self._live)) for _ in range(_REPLAYED)]
        resident, replayed = kept[0], itertools.cycle(kept)
        self.text_length = resident.text_length
        sources: dict[str, Callable[[], Batch]] = {
            RESIDENT: lambda: resident,
            REPLAYED: lambda: next(replayed),
            LIVE: lambda: next(self._live),
        }
        for _ in range(_WARM):  # the loop compiles, if it does, and logs for the first time
            yield resident
        steps = self._steps_a_turn(resident)
        for number in range(self._rounds):
            self.turns.append({})
            for name in self._names:
                if name in sources:
                    yield from self._through_the_loop(name, sources[name], steps)
                else:
                    self._without_the_loop(name, resident, steps)
            _report(number + 1, self._rounds, self.turns[-1])
        raise Finished

    def _steps_a_turn(self, batch: Batch) -> int:
        """A multiple of log_every, so that each turn bears as many rows."""
        self._call_bare(batch, _WARM)
        begin = time.perf_counter()
        self._call_bare(batch, _WARM)
        each = (time.perf_counter() - begin) / _WARM
        every = self._job.config.log_every
        return every * max(1, math.ceil(self._seconds / each / every))

    @contextlib.contextmanager
    def _timed(self, name: str, steps: int) -> Iterator[Turn]:
        """A turn, from an idle device to an idle one."""
        assert self._step is not None
        turn = self.turns[-1][name] = Turn(steps)
        finish(self._job.precision.device)
        begin, cpu, inside = time.perf_counter(), time.process_time(), self._step.inside_s
        yield turn
        finish(self._job.precision.device)
        turn.seconds, turn.cpu_s = time.perf_counter() - begin, time.process_time() - cpu
        turn.inside_s = self._step.inside_s - inside

    def _through_the_loop(self, name: str, source: Callable[[], Batch], steps: int) -> Iterator[Batch]:
        for _ in range(_WARM):
            yield source()
        with self._timed(name, steps) as turn:
            for _ in range(steps):
                before = time.perf_counter()
                batch = source()
                turn.wait_s += time.perf_counter() - before
                yield batch

    def _without_the_loop(self, name: str, resident: Batch, steps: int) -> None:
        if name == BARE:
            self._call_bare(resident, _WARM)
            with self._timed(name, steps):
                self._call_bare(resident, steps)
        else:
            self._drain(_REPLAYED, 0)  # what was read ahead while nobody asked
            with self._timed(name, steps) as turn:
                turn.steps = self._drain(steps, self._seconds)
            turn.wait_s = turn.seconds

    def _drain(self, least: int, seconds: float) -> int:
        """Take batches from the loader for so long; their number."""
        begin = time.perf_counter()
        for count in itertools.count(1):
            next(self._live)
            if count >= least and time.perf_counter() - begin >= seconds:
                break
        return count

    def _call_bare(self, batch: Batch, steps: int) -> None:
        for _ in range(steps):
            self._bare(batch, self._job.config.optim.lr)
        finish(self._job.precision.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What came of all turns."""

    rounds: list[dict[str, Turn]]
    device: torch.device
    precision: str
    backend: str
    text_length: int


def take_turns(config: TrainConfig, names: Sequence[str], *, rounds: int, seconds: float) -> Taken:
    """Build the run that `config` asks for and measure each of the turns once a round."""
    config = replace(config, steps=_FOREVER, validate_every=0, save_every=_FOREVER, stop_at=None, resume="never")
    job = build_job(build_setting(config, Ranks()), None, None)
    with job.loader, open(os.devnull, "w", encoding="utf-8") as nowhere:
        prepare_folder(job)
        loader = TurnLoader(job, names, rounds=rounds, seconds=seconds)
        # The loop's own lines count steps without end; away from a terminal it shows no bar.
        with contextlib.redirect_stderr(nowhere), mock.patch.object(train.loop, "build_step", loader.build_step):
            loop = train.loop.Loop(replace(job, loader=loader), StopRequest())  # type: ignore[arg-type]
        try:
            with contextlib.redirect_stdout(nowhere):
                loop.train()
        except Finished:
            pass
        finally:
            loop.close()
    return Taken(
        rounds=loader.turns,
        device=job.precision.device,
        precision=job.precision.name,
        backend=resolve_backend(job.loader.config, World(device=job.precision.device)),
        text_length=loader.text_length,
    )


def keep(batch: Batch) -> Batch:
    """A copy that outlives the loader's next batch."""
    tensors = {name: getattr(batch, name).clone() for name in ("images", "tokens", "labels", "samples")}
    return replace(batch, **tensors)


def finish(device: torch.device) -> None:
    """Wait for all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _report(number: int, rounds: int, turns: dict[str, Turn]) -> None:
    told = "  ".join(f"{name} {turn.seconds / turn.steps * 1e3:,.1f} ms" for name, turn in turns.items())
    with contextlib.redirect_stdout(sys.stderr):
        say(f"round {number}/{rounds}  {told}")
