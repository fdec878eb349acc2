"""Time a loader: from a fresh start, past what it had ready, over a stretch of wall-clock time."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.loader import Loader


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One measurement of one case."""

    images_per_s: float
    """Rank's images over the measured stretch."""
    first_batch_s: float
    """From the call that builds the loader to its first batch: opening files, starting threads or processes."""
    images: int
    """Images in the measured stretch."""


def measure(build: Callable[[], Loader], *, warmup_batches: int, seconds: float, device: torch.device) -> Round:
    """Build a loader, drop its first batches (queues were filled while nobody looked), then count for `seconds`."""
    started = time.perf_counter()
    with build() as loader:
        next(loader)
        _finish(device)
        first_batch_s = time.perf_counter() - started
        for _ in range(warmup_batches):
            next(loader)
        _finish(device)
        started, images = time.perf_counter(), 0
        while time.perf_counter() - started < seconds or not images:
            images += len(next(loader))
        _finish(device)
        taken = time.perf_counter() - started
    return Round(images_per_s=images / taken, first_batch_s=first_batch_s, images=images)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
