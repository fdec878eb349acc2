"""Batches of any size out of one that was read, and the search for the size at which films/s stop growing."""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.turns import finish
from pipeline.batch import Batch

GROWTH = 1.03
"""Doubling a batch has to bring so much."""
_LEFT_FREE = 0.25
"""Of the memory that is free before a step, a CPU's search leaves this share."""


def sized(batch: Batch, size: int) -> Batch:
    """A batch of `size` samples, those of `batch` again and again: what they show is nothing to the time of a step."""
    times = -(-size // len(batch))
    tensors = {
        name: getattr(batch, name).repeat(times, *([1] * (getattr(batch, name).ndim - 1)))[:size]
        for name in ("tokens", "labels", "samples")
    }
    images = batch.images.repeat(times, 1, 1, 1)[:size].contiguous(memory_format=torch.channels_last)
    return replace(batch, images=images, **tensors)


def search_batch(
    build: Callable[[int], Any], device: torch.device, *, first: int, largest: int, seconds: float
) -> list[dict[str, Any]]:
    """Double the batch from `first` until films/s grow by less than 3 %, memory ends, or `largest` is reached.

    A list of what was tried, {batch_size, images_per_s, ended}; `ended` says why no larger one was. `build` gives a
    trainer for a batch size.
    """
    tried: list[dict[str, Any]] = []
    size = first
    while True:
        before = available_memory(device)
        try:
            rate, taken = _rate(build, device, size, seconds)
        except torch.OutOfMemoryError:
            if not tried:
                raise
            tried[-1]["ended"] = f"batch {size}: out of memory"
            return tried
        tried.append({"batch_size": size, "images_per_s": rate, "ended": None})
        if len(tried) > 1 and rate < tried[-2]["images_per_s"] * GROWTH:
            tried[-1]["ended"] = f"batch {size}: less than {GROWTH - 1:.0%} faster than batch {size // 2}"
        elif 2 * size > largest:
            tried[-1]["ended"] = f"--largest-batch {largest}"
        elif device.type == "cpu" and 2 * taken > before * (1 - _LEFT_FREE):
            tried[-1]["ended"] = f"batch {2 * size}: memory would not do"
        if tried[-1]["ended"]:
            return tried
        size *= 2


def best_batch(tried: list[dict[str, Any]]) -> int:
    """The size with the most films/s."""
    return max(tried, key=lambda found: found["images_per_s"])["batch_size"]


def _rate(build: Callable[[int], Any], device: torch.device, size: int, seconds: float) -> tuple[float, float]:
    """Films/s at a batch size, and bytes that it took."""
    before = available_memory(device)
    trainer = build(size)
    trainer.run(2)
    finish(device)
    taken = before - available_memory(device)
    steps, begin = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - begin < seconds:
        trainer.run(2)
        finish(device)
        steps += 2
    rate = steps * size / (time.perf_counter() - begin)
    del trainer
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rate, taken


def available_memory(device: torch.device) -> float:
    """Bytes that are free: the GPU's, or what the kernel says this machine can still give."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
