"""Time a loader: from a fresh start, past what it had ready, over a stretch of wall-clock time; then its memory."""

import os
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from bench.processes import Usage, footprint, usage
from bench.storage import Counts, counts_here

_SAMPLE_EVERY_S = 0.1

Built = AbstractContextManager[Iterator[Sized]]
"""A loader: batches whose length is their number of images."""


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
    rchar: int
    """Bytes asked for by read calls in it."""
    pss_bytes: int | None = None
    """Memory of the process tree, the highest of several samples while it went on; None where it was not asked for."""
    requests: int | None = None
    """Requests in the measured stretch that the slow file system delayed, where there is one."""
    request_bytes: int | None = None
    """Bytes fetched by them."""


@dataclass(frozen=True, slots=True)
class _Mark:
    """A moment, and everything counted up to it."""

    at: float
    used: Usage
    slow: Counts | None

    @classmethod
    def now(cls) -> "_Mark":
        return cls(time.perf_counter(), usage(os.getpid()), counts_here())


def measure(
    build: Callable[[], Any],
    *,
    warmup_batches: int,
    seconds: float,
    device: torch.device,
    memory_s: float = 0.0,
    most_images: int | None = None,
) -> Round:
    """Build a loader, drop its first batches (queues were filled while nobody looked), then count for `seconds`.

    With `most_images`, for a cold run: nothing is dropped, the clock runs from the call that builds the loader, and
    stops after so many images. `memory_s` is how long memory is sampled afterwards.
    """
    begin = _Mark.now()
    with build() as loader:
        images = len(next(loader))
        _finish(device)
        first_batch_s = time.perf_counter() - begin.at
        if most_images is None:
            _drop(loader, warmup_batches)
            _finish(device)
            begin, images = _Mark.now(), 0
        while time.perf_counter() - begin.at < seconds or not images:
            images += len(next(loader))
            if most_images is not None and images >= most_images:
                break
        _finish(device)
        end = _Mark.now()
        pss = _peak_memory(loader, memory_s) if memory_s else None
    return _round(begin, end, images, first_batch_s, pss)


def _round(begin: _Mark, end: _Mark, images: int, first_batch_s: float, pss: int | None) -> Round:
    slow = None
    if begin.slow is not None and end.slow is not None:
        slow = end.slow.requests - begin.slow.requests, end.slow.bytes - begin.slow.bytes
    return Round(
        images_per_s=images / (end.at - begin.at),
        first_batch_s=first_batch_s,
        images=images,
        cpu_s_per_1000=(end.used.cpu_s - begin.used.cpu_s) / images * 1000,
        read_bytes=end.used.storage_bytes - begin.used.storage_bytes,
        rchar=end.used.asked_bytes - begin.used.asked_bytes,
        pss_bytes=pss,
        requests=slow[0] if slow else None,
        request_bytes=slow[1] if slow else None,
    )


def _drop(loader: Iterator[Sized], batches: int) -> None:
    for _ in range(batches):
        next(loader)


def _peak_memory(loader: Iterator[Sized], seconds: float) -> int:
    """Bytes: sampling walks all page tables, so that it stays out of the measured stretch."""
    end, peak = time.perf_counter() + seconds, footprint(os.getpid()).total
    sampled = time.perf_counter()
    while time.perf_counter() < end:
        next(loader)
        if time.perf_counter() - sampled >= _SAMPLE_EVERY_S:
            peak, sampled = max(peak, footprint(os.getpid()).total), time.perf_counter()
    return peak


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
