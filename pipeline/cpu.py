"""The `cpu` backend: threads over compiled kernels (or libjpeg-turbo and torch's) into reused buffers.

    feeder thread: EncodedBatches -> a free slot -> tasks of a few images
    decoding threads: task -> ImageKernel -> the slot's buffer
    trainer: the oldest slot, once all of its tasks are done; it goes back to the feeder at the next `next()`

C code does the work and releases the GIL, so threads are enough, and nothing is copied between processes. The slots
bound what is prepared ahead. Where the device is a GPU they are pinned, and copied there on a side stream.
"""

import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.batch import Batch, World, make_batch
from pipeline.config import LoaderConfig, thread_count
from pipeline.effects import apply, compiled_functions
from pipeline.encoded import Encoded, EncodedBatches
from pipeline.kernels import Crop, ImageKernel, Normalise
from shards.schema import ImageSpec, Manifest

TASK_IMAGES = 32
"""Images a task has at most: each takes a turn at the interpreter's lock."""


def task_images(images: int, threads: int) -> int:
    """How many of a batch's images go to a thread at once."""
    return max(1, min(TASK_IMAGES, -(-images // threads)))


class _Slot:
    """A reused image buffer and the batch that it is filled with."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, side: torch.cuda.Stream | None = None) -> None:
        """`side`: the stream that copies batches to a GPU; None: they stay."""
        self.images = torch.empty(shape, dtype=dtype, pin_memory=side is not None)
        self._side = side
        self.each = self.images.unbind()
        self.channels_last = self.images.permute(0, 3, 1, 2)
        self.spans: NDArray[np.int64] = np.empty((0, 2), dtype=np.int64)
        """(n, 2) address and bytes of each image of the batch."""
        self.encoded: Encoded | None = None
        self.error: BaseException | None = None
        self.done = threading.Event()
        self._sent: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self._open_tasks = 0
        self._lock = threading.Lock()

    def start(self, encoded: Encoded, tasks: int) -> None:
        """Begin a batch of so many tasks."""
        self.encoded, self.error, self._open_tasks = encoded, None, tasks
        self.spans = np.stack([encoded.records["address"], encoded.records["size"]], axis=1)
        self.done.clear()
        if not tasks:
            self.done.set()

    def finish_task(self, error: BaseException | None) -> None:
        """Note that one task is over; the first error of a batch is kept."""
        with self._lock:
            self.error = self.error or error
            self._open_tasks -= 1
            last = not self._open_tasks
        if last:
            self._send()
            self.done.set()

    def take(self) -> torch.Tensor:
        """The images (n, 3, H, W) of the batch, on the device once the caller's stream gets there."""
        if self._side is None:
            return self._batch()
        if self._sent is None:  # it is empty
            return self._batch().to(self._side.device)
        images, copied = self._sent
        stream = torch.cuda.current_stream(images.device)
        stream.wait_event(copied)
        images.record_stream(stream)  # so that its memory is free again only after the work queued there
        return images

    def give_back(self) -> None:
        """Wait until the buffer may be written to again."""
        if self._sent is not None:
            self._sent[1].synchronize()
            self._sent = None

    def _batch(self) -> torch.Tensor:
        assert self.encoded is not None
        return self.channels_last[: len(self.encoded.fate.boxes)]

    def _send(self) -> None:
        """Begin the copy to the device, beside whatever the trainer's stream is at."""
        if self._side is None or self.error is not None:
            return
        try:
            with torch.cuda.stream(self._side):
                images = self._batch().to(self._side.device, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record(self._side)
            self._sent = images, copied
        except BaseException as error:  # the device's memory is full; raised by next()
            self.error = error


_Task = tuple[_Slot, int, int]
"""Images number first .. end - 1 of a slot's batch."""


class CpuBackend:
    """Decodes one rank's batches on its CPUs."""

    def __init__(self, config: LoaderConfig, manifest: Manifest, world: World, batches: EncodedBatches) -> None:
        self._batches, self._device = batches, torch.device(world.device)
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Slot | BaseException] = queue.SimpleQueue()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._held: _Slot | None = None
        self._awaited: _Slot | BaseException | None = None
        self._failed: BaseException | None = None
        shape = (config.batch_size // world.size * config.images_a_sample, config.image_size, config.image_size, 3)
        side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        for _ in range(config.ahead + 1):
            self._free.put(_Slot(shape, getattr(torch, config.dtype), side))
        self.threads = thread_count(config, world)
        # made here and not in the threads: the first one compiles, and what goes wrong has to reach the caller
        self._kernels = [make_kernel(config, manifest.image) for _ in range(self.threads)]
        if config.changes_films:
            compiled_functions()
        self._feeder = threading.Thread(target=self._feed, name="shardclip-feed", daemon=True)
        self._decoders = start_single_threaded(self._decode, self.threads)
        self._feeder.start()

    def next(self) -> Batch:
        """The next batch; ends the one before. StopIteration after the last, InputError for a bad image."""
        if self._failed is not None:
            raise self._failed
        self._give_back()
        # Taken first and forgotten last: an interrupt while it waits (Ctrl-C in a notebook) must not cost a batch.
        slot = self._awaited = self._awaited or self._ready.get()
        if isinstance(slot, BaseException):
            self._failed = slot
            raise slot
        slot.done.wait()
        self._held, self._awaited = slot, None
        encoded = slot.encoded
        assert encoded is not None
        if slot.error is not None:
            self._failed = slot.error
            raise slot.error
        self._batches.release(encoded)
        return make_batch(slot.take(), encoded.records, encoded.position, self._device)

    def close(self) -> None:
        """Stop the threads."""
        self._free.put(None)
        self._feeder.join()
        for _ in self._decoders:
            self._tasks.put(None)
        for thread in self._decoders:
            thread.join()
        # An error that ended the feeder leads back here, and all buffers would wait for the garbage collector.
        self._ready, self._awaited, self._failed = queue.SimpleQueue(), None, None

    def _give_back(self) -> None:
        if self._held is not None:
            self._held.give_back()
            self._free.put(self._held)
            self._held = None

    def _feed(self) -> None:
        try:
            while (slot := self._free.get()) is not None:
                encoded = next(self._batches)
                size = task_images(len(encoded), self.threads)
                firsts = range(0, len(encoded), size)
                slot.start(encoded, len(firsts))
                self._ready.put(slot)
                for first in firsts:
                    self._tasks.put((slot, first, min(first + size, len(encoded))))
        except BaseException as error:  # raised by next(), where the trainer sees it
            self._ready.put(error)

    def _decode(self) -> None:
        kernel = self._kernels.pop()
        while (task := self._tasks.get()) is not None:
            try:
                self._run(kernel, *task)
            except BaseException as error:
                task[0].finish_task(error)
            else:
                task[0].finish_task(None)

    def _run(self, kernel: ImageKernel, slot: _Slot, index: int, end: int) -> None:
        encoded = slot.encoded
        assert encoded is not None
        fate = encoded.fate
        while index < end:
            if fate.effects is None:
                index = kernel.run(slot.spans, fate.boxes, fate.flipped, slot.images, index, end)
            if index < end:
                kernel.resize(list(crops(slot, encoded, index, self._pixels(kernel, encoded, index))))
                index += 1

    def _pixels(self, kernel: ImageKernel, encoded: Encoded, index: int) -> NDArray[np.uint8]:
        """A sample's pixels (H, W), of another one where it cannot be decoded; valid until the kernel's next."""
        image = encoded.images[index]
        while True:
            try:
                return kernel.decode(image)
            except ValueError as error:
                image = self._batches.replace(encoded, index, error)


def make_kernel(config: LoaderConfig, spec: ImageSpec) -> ImageKernel:
    """What one thread decodes and resizes with."""
    normalise = Normalise(config.mean, config.std)
    return ImageKernel(spec, size=config.image_size, normalise=normalise, dtype=config.dtype, own_jpeg=config.own_jpeg)


def crops(slot: _Slot, encoded: Encoded, index: int, film: NDArray[np.uint8]) -> Iterator[Crop]:
    """What becomes of the film of a sample: a crop a view."""
    fate = encoded.fate
    for view in range(index, len(fate.boxes), len(encoded)):
        pixels = film if fate.effects is None else apply(film, fate.effects[view])
        yield pixels, fate.boxes[view].tolist(), bool(fate.flipped[view]), slot.each[view]


def start_single_threaded(target: Callable[[], None], count: int) -> list[threading.Thread]:
    """Start threads whose torch operators stay in them, and leave the caller's intra-op setting as it was.

    torch.set_num_threads sets two things: the calling thread's own count, and what threads get that use torch for the
    first time later. The workers set theirs to 1; then the caller's count is set again, for the later ones.
    """
    before = torch.get_num_threads()
    ready = threading.Barrier(count + 1)

    def work() -> None:
        torch.get_num_threads()  # takes the default first, or it would be taken later and undo the next line
        torch.set_num_threads(1)
        ready.wait()
        target()

    threads = [threading.Thread(target=work, name=f"shardclip-decode-{number}", daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    ready.wait()
    torch.set_num_threads(before)
    return threads
