"""The floor of the `cpu` backend: its kernels alone, on films in memory, and what each of them takes.

    films of the split in memory -> threads: decode, resize, normalise -> buffers as large as the loader's

What a loader does beside this is overhead: reading, digests, order, crops, handing over.
"""

import itertools
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.batch import World
from pipeline.config import LoaderConfig, thread_count
from pipeline.cpu import TASK_IMAGES, start_single_threaded
from pipeline.encoded import decide
from pipeline.kernels import ImageKernel, Normalise
from shards.manifest import read_manifest
from shards.reader import ShardReader
from shards.schema import Manifest

FILMS = 2048
"""Films held in memory, at most."""


def read_films(root: Path, manifest: Manifest, split: str) -> list[NDArray[np.uint8]]:
    """The first encoded films of a split."""
    films: list[NDArray[np.uint8]] = []
    for info in manifest.splits[split]:
        with ShardReader(root, manifest, info) as reader:
            for block in range(reader.blocks):
                rows = reader.read_rows(block)
                for offset, size in zip(rows.offset.tolist(), rows.size.tolist(), strict=True):
                    films.append(np.frombuffer(os.pread(reader.fd, size, offset), dtype=np.uint8))
                    if len(films) == FILMS:
                        return films
    return films


class Floor:
    """Iterates over batches as a loader does, but what it hands out is only their length."""

    def __init__(self, config: LoaderConfig) -> None:
        manifest = read_manifest(config.shards)
        self._films = read_films(config.shards, manifest, config.split)
        self._fate = decide(config, manifest, np.arange(len(self._films)), np.zeros(len(self._films), dtype=bool))
        self._size, threads = config.batch_size, thread_count(config, World())
        shape = (config.batch_size * (config.ahead + 1), config.image_size, config.image_size, 3)
        self._out = torch.empty(shape, dtype=getattr(torch, config.dtype)).unbind()
        self._numbers = itertools.count()
        self._done, self._closed = threading.Semaphore(0), False
        normalise = Normalise(config.mean, config.std)
        self.kernels = [
            ImageKernel(
                manifest.image,
                size=config.image_size,
                normalise=normalise,
                dtype=config.dtype,
                own_jpeg=config.own_jpeg,
            )
            for _ in range(threads)
        ]
        self._idle = iter(self.kernels)
        self._threads = start_single_threaded(self._work, threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        for thread in self._threads:
            thread.join()

    def __next__(self) -> range:
        for _ in range(self._size // TASK_IMAGES):
            self._done.acquire()
        return range(self._size // TASK_IMAGES * TASK_IMAGES)

    def _work(self) -> None:
        kernel = next(self._idle)
        boxes, flipped = self._fate.boxes.tolist(), self._fate.flipped.tolist()
        while not self._closed:
            first = next(self._numbers) * TASK_IMAGES
            films = [number % len(self._films) for number in range(first, first + TASK_IMAGES)]
            outs = [self._out[number % len(self._out)] for number in range(first, first + TASK_IMAGES)]
            fates = [(boxes[film], flipped[film], out) for film, out in zip(films, outs, strict=True)]
            kernel.run([self._films[film] for film in films], fates)
            self._done.release()


def parts(config: LoaderConfig, seconds: float = 1.0) -> dict[str, float]:
    """CPU microseconds a film on one core: decoding, and everything from pixels to the batch."""
    with Floor(config) as floor:
        floor._closed = True
    kernel, films = floor.kernels[0], floor._films
    boxes, flipped = floor._fate.boxes.tolist(), floor._fate.flipped.tolist()
    pixels = kernel.decode(films[0])

    def decode(number: int) -> None:
        kernel.decode(films[number % len(films)])

    def resize(number: int) -> None:
        film = number % len(films)
        kernel.resize([(pixels, boxes[film], flipped[film], floor._out[number % len(floor._out)])])

    return {"decode_us": _cpu_us(decode, seconds), "resize_normalise_us": _cpu_us(resize, seconds)}


def _cpu_us(work, seconds: float) -> float:
    """CPU microseconds a call, the least of several stretches: what else the machine does only adds to it."""
    least, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds or least == float("inf"):
        begin = time.thread_time()
        for number in range(200):
            work(number)
        least = min(least, (time.thread_time() - begin) / 200 * 1e6)
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
            spent = int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0])
        except (OSError, ValueError):
            continue
        name = thread.name.removeprefix("shardclip-").split("-")[0] if "shardclip" in thread.name else "main"
        found[name] = found.get(name, 0) + spent
    return found
