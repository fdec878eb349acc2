"""The floor of the `cpu` backend: its kernels alone, on films in memory, and what each of them takes.

    films of the split in memory -> threads: decode, resize, normalise -> buffers as large as the loader's

What a loader does beside this is overhead: reading, digests, order, crops, handing over.
"""

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.augment import decide
from pipeline.batch import World
from pipeline.config import LoaderConfig, thread_count
from pipeline.cpu import make_kernel, start_single_threaded, task_images
from pipeline.kernels import ImageKernel
from shards.manifest import read_manifest
from shards.scan import read_image, read_samples
from shards.schema import Manifest

FILMS = 2048
"""Films held in memory, at most."""
_STRETCH = 16
"""Calls timed together."""


def read_films(root: Path, manifest: Manifest, split: str) -> list[NDArray[np.uint8]]:
    """The first encoded films of a split."""
    rows = np.arange(min(FILMS, manifest.rows(split)))
    found = read_samples(root, manifest, split, rows, ("key", "offset", "size", "xxh3"))
    return [np.frombuffer(read_image(reader, row), dtype=np.uint8) for reader, row in found]


class Floor:
    """Iterates over batches as a loader does, but what it hands out is only their length."""

    def __init__(self, config: LoaderConfig) -> None:
        manifest = read_manifest(config.shards)
        self.films = read_films(config.shards, manifest, config.split)
        self._size, threads = config.batch_size, thread_count(config, World())
        self.task = task_images(self._size, threads)
        self.films *= -(-self.task // len(self.films))
        self.spans = np.array([(film.ctypes.data, len(film)) for film in self.films], dtype=np.int64)
        self.fate = decide(config, manifest, np.arange(len(self.films)), np.zeros(len(self.films), dtype=bool))
        shape = (config.batch_size * (config.ahead + 1), config.image_size, config.image_size, 3)
        self.out = torch.empty(shape, dtype=getattr(torch, config.dtype))
        self._numbers = itertools.count(0, self.task)
        self._done, self._closed = threading.Semaphore(0), False
        self.kernels = [make_kernel(config, manifest.image) for _ in range(threads)]
        self._idle = iter(self.kernels)
        self._threads = start_single_threaded(self._work, threads)

    def close(self) -> None:
        """Stop the threads."""
        self._closed = True
        for thread in self._threads:
            thread.join()

    def __next__(self) -> range:
        for _ in range(self._size // self.task):
            self._done.acquire()
        return range(self._size // self.task * self.task)

    def _work(self) -> None:
        kernel = next(self._idle)
        while not self._closed:
            self.run_task(kernel, next(self._numbers))
            self._done.release()

    def run_task(self, kernel: ImageKernel, number: int) -> None:
        """The films of a task to their place in the output, as a decoding thread of the loader does it."""
        first = number % (len(self.films) - self.task + 1)
        place = number % (len(self.out) - self.task + 1)
        each, index = slice(first, first + self.task), 0
        boxes, flipped, out = self.fate.boxes[each], self.fate.flipped[each], self.out[place : place + self.task]
        while (index := kernel.run(self.spans[each], boxes, flipped, out, index, self.task)) < self.task:
            pixels = kernel.decode(self.films[first + index])
            kernel.resize([(pixels, boxes[index].tolist(), bool(flipped[index]), out[index])])
            index += 1


def parts(config: LoaderConfig, seconds: float = 1.0) -> dict[str, float]:
    """CPU microseconds a film on one core: decoding, and everything from pixels to the batch.

    Both together are measured as the loader does them, the second one alone, on one film.
    """
    floor = Floor(config)
    floor.close()
    kernel, tasks, films = floor.kernels[0], itertools.count(0, floor.task), len(floor.films)
    pixels, boxes, flipped = kernel.decode(floor.films[0]), floor.fate.boxes.tolist(), floor.fate.flipped.tolist()

    def both() -> int:
        floor.run_task(kernel, next(tasks))
        return floor.task

    def resize() -> int:
        first = next(tasks)
        at = ((each % films, floor.out[each % len(floor.out)]) for each in range(first, first + floor.task))
        kernel.resize([(pixels, boxes[film], flipped[film], out) for film, out in at])
        return floor.task

    together, second = least_us(both, seconds), least_us(resize, seconds)
    return {"decode_us": together - second, "resize_normalise_us": second}


def least_us(work: Callable[[], int], seconds: float) -> float:
    """CPU microseconds a film, the least of several stretches: what else the machine does only adds to it.

    `work` says how many films it did.
    """
    least, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds or least == float("inf"):
        begin, films = time.thread_time(), 0
        for _ in range(_STRETCH):
            films += work()
        least = min(least, (time.thread_time() - begin) / films * 1e6)
    return least


def thread_times(config: LoaderConfig, seconds: float = 3.0) -> dict[str, float]:
    """CPU microseconds a film by kind of thread of the `cpu` backend: read, feed, decode, main (who takes batches)."""
    from pipeline.loader import build_loader

    with build_loader(config, World()) as loader:
        for _ in range(8):
            next(loader)
        before, films, started = _times(), 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            films += len(next(loader))
        after = _times()
    return {f"{name}_us": (after[name] - before.get(name, 0)) / films / 1e3 for name in sorted(after)}


def _times() -> dict[str, int]:
    """CPU nanoseconds of this process so far, by kind of thread; those that come and go are not told apart."""
    found: dict[str, int] = {}
    for thread in threading.enumerate():
        try:
            spent = int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text("utf-8").split()[0])
        except (OSError, ValueError):
            continue
        name = thread.name.removeprefix("shardclip-").split("-")[0] if "shardclip" in thread.name else "main"
        found[name] = found.get(name, 0) + spent
    return found
