"""The `dali` backend: one graph that runs on the GPU or on the CPU, a function of what is fed to it.

    encoded bytes, crop box, flip -> decode (GRAY) -> [effects] -> slice -> cubic resize with antialias (uint8)
        -> three channels -> flip, normalise -> HWC, seen from torch as NCHW channels_last, no copy

Read-ahead, order and augmentation stay outside, so DALI holds no state worth saving. GRAY throughout, because grey JPEG
with ANY_DATA crashes DALI's CPU decoder; slice before resize, because a region of interest reads outside the box at its
border; uint8 after the resize, because cubic overshoots 0..255 by up to 20 otherwise (measured, DALI 2.4).
"""

import gc
import queue
import threading
from collections import defaultdict, deque
from typing import Any

import numpy as np
import torch

from pipeline.batch import Batch, World, make_batch
from pipeline.config import LoaderConfig, thread_count
from pipeline.decode import check_image
from pipeline.effects import for_graph, in_graph
from pipeline.encoded import Encoded, EncodedBatches
from pipeline.kernels import ImageKernel, Normalise
from pipeline.quarantine import ShardNames
from shards.errors import InputError
from shards.schema import ImageSpec, Manifest

DALI_DTYPES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "FLOAT"}
"""Loader dtype -> DALI's; it has no bfloat16, which torch makes from FLOAT."""


def build_graph(
    config: LoaderConfig, spec: ImageSpec, source: Any, *, batch_size: int, threads: int, device: torch.device
) -> Any:
    """A DALI pipeline with one output (H, W, 3) for what `source()` returns, in batches.

    `source` gives lists or arrays over n samples: encoded bytes (uint8, 1-D), box start y, x (int32), box size h, w
    (int32), flip 0 or 1 (int32), and where the config asks for effects their numbers (4,) (float32).
    """
    fn, pipeline_def, types = _import_dali()
    gpu = device.type == "cuda"
    number = torch.cuda.current_device() if gpu and device.index is None else device.index

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=number if gpu else None,
        prefetch_queue_depth=config.ahead,
    )
    def graph() -> Any:
        inputs = [(types.UINT8, 1), (types.INT32, 1), (types.INT32, 1), (types.INT32, 0)]
        inputs += [(types.FLOAT, 1)] if config.changes_films else []
        encoded, start, size, flip, *numbers = fn.external_source(
            source=source,
            num_outputs=len(inputs),
            dtype=[dtype for dtype, _ in inputs],
            ndim=[ndim for _, ndim in inputs],
        )
        if spec.codec == "raw":
            pixels = fn.reshape(encoded.gpu() if gpu else encoded, shape=[spec.height, spec.width, 1], layout="HWC")
        else:
            pixels = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.GRAY)
        if numbers:
            pixels = in_graph(fn, types, pixels, *numbers)
        crop = fn.slice(pixels, start, size, axes=(0, 1))
        small = fn.resize(
            crop,
            size=(config.image_size, config.image_size),
            interp_type=types.INTERP_CUBIC,
            antialias=True,
            dtype=types.UINT8,
        )
        return fn.crop_mirror_normalize(
            fn.cat(small, small, small, axis=2),
            mirror=flip,
            mean=[255 * each for each in config.mean],
            std=[255 * each for each in config.std],
            output_layout="HWC",
            dtype=getattr(types, DALI_DTYPES[config.dtype]),
        )

    built = graph()
    built.build()
    return built


def _import_dali() -> tuple[Any, Any, Any]:
    """fn, pipeline_def, types: Any, because DALI's stubs do not know the values its types get at run time."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise InputError(
            f"backend dali needs the package nvidia-dali-cuda120 ({error}); install it or use --backend cpu"
        ) from None
    return fn, pipeline_def, types


class DaliBackend:
    """Feeds the graph and takes its outputs. A thread gathers batches, so that the trainer never waits for a disk."""

    def __init__(self, config: LoaderConfig, manifest: Manifest, world: World, batches: EncodedBatches) -> None:
        self._config, self._image, self._batches = config, manifest.image, batches
        self._device = torch.device(world.device)
        self._gathered: queue.SimpleQueue[Encoded | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(config.ahead)
        self._fed: deque[Encoded] = deque()
        self._trial = Trial(manifest, batches) if config.max_bad else None
        self._last_fed: Encoded | None = None
        self._empty: Encoded | None = None
        self._closed = False
        self._failed: BaseException | None = None
        self._graph = build_graph(
            config,
            manifest.image,
            self._source,
            batch_size=config.batch_size // world.size * config.images_a_sample,
            threads=thread_count(config, world),
            device=self._device,
        )
        self._gatherer = threading.Thread(target=self._gather, name="shardclip-gather", daemon=True)
        self._gatherer.start()

    def next(self) -> Batch:
        """The next batch; ends the one before. StopIteration after the last, InputError for a bad image."""
        if self._failed is not None:
            raise self._failed
        try:
            images = self._run()
        except StopIteration:
            if self._empty is None:
                raise
            encoded, self._empty = self._empty, None
            return self._batch(encoded, torch.empty(0, self._config.image_size, self._config.image_size, 3))
        except BaseException as error:
            self._failed = error
            raise
        return self._batch(self._fed.popleft(), images)

    def close(self) -> None:
        """Stop the thread and drop the graph."""
        self._closed = True
        self._room.release()
        self._gatherer.join()
        self._graph = None
        # A graph sits in reference cycles. Destroyed later, in a forked child (a DataLoader's worker) that has none of
        # its threads, it would wait for them for ever; so here and now.
        gc.collect()

    def _run(self) -> torch.Tensor:
        """(n, H, W, 3) of the oldest batch that was fed, on the device."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            # Bound to the trainer's stream: DALI's memory is then free again only after the work queued there.
            (output,) = self._graph.run(stream)
        except RuntimeError as error:
            if isinstance(self._failed, InputError):
                raise self._failed from None
            if "decoders" not in str(error):
                raise
            raise self._undecodable(error) from None
        return torch.from_dlpack(output.as_tensor())

    def _batch(self, encoded: Encoded, images: torch.Tensor) -> Batch:
        images = images.to(self._device, getattr(torch, self._config.dtype)).permute(0, 3, 1, 2)
        return make_batch(images, encoded.records, encoded.position, self._device)

    def _source(self) -> tuple[Any, ...]:
        """Called by the graph for each batch that it starts; what it was given before has been copied by now."""
        if self._last_fed is not None:
            self._batches.release(self._last_fed)
            self._last_fed = None
        encoded = self._gathered.get()
        if isinstance(encoded, BaseException):
            self._gathered.put(encoded)
            self._failed = None if isinstance(encoded, StopIteration) else encoded
            raise encoded
        self._room.release()
        if not len(encoded):
            self._empty = encoded
            raise StopIteration
        self._last_fed = encoded
        self._fed.append(encoded)
        fate = encoded.fate
        start, size = (np.ascontiguousarray(half, dtype=np.int32) for half in np.split(fate.boxes, 2, axis=1))
        numbers = [] if fate.effects is None else [for_graph(fate.effects)]
        return encoded.images * self._config.images_a_sample, start, size, fate.flipped.astype(np.int32), *numbers

    def _gather(self) -> None:
        try:
            for encoded in self._batches:
                if self._trial is not None:
                    self._trial.run(encoded)
                check_headers(encoded, self._image, self._batches.names)
                self._room.acquire()
                if self._closed:
                    return
                self._gathered.put(encoded)
            self._gathered.put(StopIteration())
        except BaseException as error:  # raised by next(), where the trainer sees it
            self._gathered.put(error)

    def _undecodable(self, error: RuntimeError) -> InputError:
        """DALI fails a batch as a whole and does not say which sample: name the shards it came from."""
        shards = np.unique(self._fed[0].records["shard"]).tolist() if self._fed else []
        names = ", ".join(map(self._batches.names, shards))
        reason = next((line for line in str(error).splitlines() if line.startswith("Error")), "")[:160]
        return InputError(f"DALI cannot decode a batch of {names} ({reason}); --backend cpu names the image")


def check_headers(encoded: Encoded, spec: ImageSpec, names: ShardNames) -> None:
    """InputError where an image is not what the data set says: inside DALI it would cost the batch its name, and a
    larger one would be cropped as if it were of the right size."""
    for index, image in enumerate(encoded.images):
        try:
            check_image(image, spec)
        except ValueError as error:
            raise InputError(f"{encoded.describe(index, names)} cannot be decoded ({error}); ingest again") from None


class Trial:
    """Tries to decode each image the first time it is seen, and replaces what cannot be: DALI fails a whole batch.

    As the `cpu` backend does, so that both call the same images bad. A decode on the CPU, in the first epoch alone.
    """

    def __init__(self, manifest: Manifest, batches: EncodedBatches) -> None:
        self._batches = batches
        self._kernel = ImageKernel(manifest.image, size=1, normalise=Normalise((0, 0, 0), (1, 1, 1)))
        self._tried: defaultdict[int, int] = defaultdict(int)
        """Shard -> a bit for each of its rows."""

    def run(self, encoded: Encoded) -> None:
        """Try each image of a batch that was not tried before."""
        for index in range(len(encoded)):
            while not self._is_sound(encoded, index):
                pass

    def _is_sound(self, encoded: Encoded, index: int) -> bool:
        shard, row = int(encoded.records["shard"][index]), int(encoded.records["row"][index])
        if not self._tried[shard] >> row & 1:
            try:
                self._kernel.decode(encoded.images[index])
            except ValueError as error:
                self._batches.replace(encoded, index, error)
                return False
            self._tried[shard] |= 1 << row
        return True
