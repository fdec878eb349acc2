"""`python -m bench.measure TASK RESULT PARENT`: what a child of the loader bench does (see `bench.case`).

Time a loader: from a fresh start, past what it had ready, over a stretch of wall-clock time; then its memory.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.case import FLOOR, UINT8_FILE, Task
from bench.machine import look
from bench.processes import footprint, forks_die_too, usage
from bench.storage import counts
from shards.atomic import write_json
from shards.cli import main_guard
from shards.processes import die_with_parent

_SAMPLE_EVERY_S = 0.1
_LEVEL, _MOST_STRETCHES = 0.1, 10
"""Share of a stretch's films by which the read-ahead may change where the rate is steady; the stretch that is taken
whatever it shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One measurement of one case."""

    images_per_s: float
    """Rank's images over the measured stretch."""
    first_batch_s: float
    """From the call that builds the loader to its first batch: opening files, starting threads or processes."""
    images: int
    """Images in the measured stretch."""
    cpu_s_per_1000: float
    """Seconds of user and system time of the process tree in the measured stretch, for 1,000 images."""
    read_bytes: int
    """Bytes fetched from storage in the measured stretch."""
    pss_bytes: int | None = None
    """Memory of the process tree, the highest of several samples while it went on; None where it was not asked for."""
    requests: int | None = None
    """Requests in the measured stretch that the slow file system delayed, where there is one."""
    request_bytes: int | None = None
    """Bytes fetched by them."""


def measure(
    build: Callable[[], Any],
    *,
    warmup_batches: int,
    seconds: float,
    device: str,
    memory_s: float = 0.0,
    most_images: int | None = None,
    held: Callable[[Any], float] | None = None,
) -> Round:
    """Build a loader, drop its first batches (queues were filled while nobody looked), then count for `seconds`.

    With `most_images`, for a cold run: nothing is dropped, the clock runs from the call that builds the loader, and
    stops after so many images. With `held`, how many films a loader has read ahead, stretches that filled its
    read-ahead or lived on it are dropped too. `memory_s` is how long memory is sampled afterwards. `build` gives a
    context with an iterator over batches whose length is their number of images.
    """
    begin = _counted()
    with build() as loader:
        images = len(next(loader))
        _finish(device)
        first_batch_s = time.perf_counter() - begin["s"]
        if most_images is None:
            for _ in range(warmup_batches):
                next(loader)
            _finish(device)
        for _ in range(_MOST_STRETCHES):
            if most_images is None:
                begin, images = _counted(), 0
            before = held(loader) if held else 0.0
            while time.perf_counter() - begin["s"] < seconds or not images:
                images += len(next(loader))
                if most_images is not None and images >= most_images:
                    break
            _finish(device)
            end = _counted()
            if held is None or abs(held(loader) - before) <= _LEVEL * images:
                break
        pss = _peak_memory(loader, memory_s) if memory_s else None
    return _round(begin, end, images, first_batch_s, pss)


def _counted() -> dict[str, float]:
    """All that is counted, so far."""
    used, slow = usage(os.getpid()), counts()
    found = {"s": time.perf_counter(), "cpu_s": used.cpu_s, "read_bytes": used.storage_bytes}
    return found | ({"requests": slow.requests, "request_bytes": slow.bytes} if slow else {})


def _round(begin: dict[str, float], end: dict[str, float], images: int, first_batch_s: float, pss: int | None) -> Round:
    spent = {name: end[name] - before for name, before in begin.items()}
    return Round(
        images_per_s=images / spent.pop("s"),
        first_batch_s=first_batch_s,
        images=images,
        cpu_s_per_1000=spent.pop("cpu_s") / images * 1000,
        pss_bytes=pss,
        **{name: int(count) for name, count in spent.items()},
    )


def _peak_memory(loader: Iterator[Sized], seconds: float) -> int:
    """Bytes: sampling walks all page tables, so that it stays out of the measured stretch."""
    end, peak = time.perf_counter() + seconds, footprint(os.getpid()).total
    sampled = time.perf_counter()
    while time.perf_counter() < end:
        next(loader)
        if time.perf_counter() - sampled >= _SAMPLE_EVERY_S:
            peak, sampled = max(peak, footprint(os.getpid()).total), time.perf_counter()
    return peak


def _finish(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def forget_rows() -> None:
    """A slow file system stands for one whose data are larger than memory: rows are read at every visit, as there."""
    from pipeline import handles

    handles.ROWS_KEPT = 0


def _measure(task: Task) -> dict[str, Any]:
    taken = measure(
        _builder(task),
        warmup_batches=task.warmup_batches,
        seconds=task.seconds,
        device=task.device,
        memory_s=task.memory_s,
        most_images=task.most_images,
    )
    return {name: value for name, value in asdict(taken).items() if value is not None}


def _builder(task: Task) -> Callable[[], Any]:
    from bench import others, peers
    from pipeline.batch import World
    from pipeline.loader import build_loader

    theirs = others.LOADERS | peers.LOADERS
    if task.loader in theirs:
        return lambda: theirs[task.loader](_job(task))
    settings = _settings(task)
    if task.loader == FLOOR:
        from bench.kernels import Floor

        return lambda: closing(Floor(settings))
    return lambda: build_loader(settings, World(device=task.device))


def _settings(task: Task) -> Any:
    from pipeline.config import LoaderConfig

    ours = task.loader in ("cpu", "dali", "hdf5", "hdf5-tuned")
    return LoaderConfig(
        shards=Path(task.shards),
        h5=Path(task.h5) if task.h5 else None,
        h5_dataset=task.dataset,
        backend=task.loader if ours else "cpu",
        batch_size=task.batch_size,
        threads=task.threads,
        seed=task.seed,
        own_jpeg=task.own_jpeg,
    )


def _job(task: Task) -> Any:
    from bench.others import Job

    return Job(settings=_settings(task), data=Path(task.data), device=task.device, mapped=counts() is None)


def _write(task: Task) -> dict[str, Any]:
    from bench import peers
    from bench.sizes import write_uint8

    if task.loader in peers.WRITERS:
        peers.WRITERS[task.loader](_job(task))
    else:
        write_uint8(Path(str(task.h5)), task.dataset, Path(task.data) / UINT8_FILE)
    return {}


def _profile(task: Task) -> dict[str, Any]:
    from bench.stages import stages

    return stages(_settings(task), task.seconds)


def _together(task: Task) -> dict[str, Any]:
    from bench.together import TogetherConfig, run_together

    wanted = TogetherConfig(
        shards=Path(task.shards),
        backend="cpu" if task.loader == "cpu" else "auto",
        batch_size=task.batch_size,
        rounds=task.rounds,
        seconds=task.seconds,
        threads=task.threads,
    )
    return run_together(wanted)


_ACTIONS = {"measure": _measure, "write": _write, "look": look, "profile": _profile, "together": _together}


def main() -> None:
    with main_guard("bench.measure"):
        die_with_parent()
        if len(sys.argv) > 3 and os.getppid() != int(sys.argv[3]):  # it died before we asked
            raise SystemExit(1)
        forks_die_too()
        task = Task(**json.loads(sys.argv[1]))
        if task.peers_path:
            sys.path.append(task.peers_path)  # after everything that is installed here
        if counts() is not None:
            forget_rows()
        write_json(Path(sys.argv[2]), _ACTIONS[task.action](task))


if __name__ == "__main__":
    main()
