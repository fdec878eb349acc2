"""Peers, each over the same films in the format that it wants: SPDL, MosaicML Streaming, LitData, FFCV (extra `peers`).

Each is set up as its own documentation has it for speed, and given what is in its favour: JPEG decoding by
libjpeg-turbo and one channel until the last step where films go through a function of ours (`FilmTransform`), orders
and crops drawn as it likes, no digests, reports left aside. What it cannot do is said in `cases.NOTES`.
"""

import importlib.util
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.others import ASPECT, FilmTransform, Job, shard_paths
from pipeline.config import LoaderConfig
from pipeline.kernels import Normalise
from shards.manifest import read_manifest
from shards.scan import read_image, read_samples

EPOCH = 10_000
"""Films an epoch has at least, by repeating them: at the end of an epoch some peers stop their workers' work."""

PACKAGES = {"spdl": ("spdl.io", "spdl-core spdl-io"), "streaming": ("streaming", "mosaicml-streaming")}
PACKAGES |= {name: (name, name) for name in ("litdata", "ffcv")}
"""Case -> what has to be importable, and what to install."""


def missing(name: str) -> str | None:
    """Why a peer cannot run here; None where it is installed. Whether importing it works, measuring it will show."""
    module, packages = PACKAGES[name]
    try:
        found = importlib.util.find_spec(module) is not None
    except ImportError:
        found = False
    return None if found else f"not installed (pip install {packages})"


def films(job: Job) -> Iterator[tuple[bytes, str]]:
    """JPEG and report of every film of the split."""
    root, split = Path(job.settings.shards), job.settings.split
    manifest = read_manifest(root)
    columns = ("key", "offset", "size", "xxh3", "text")
    for reader, row in read_samples(root, manifest, split, np.arange(manifest.rows(split)), columns):
        yield read_image(reader, row), row["text"]


def repeated(job: Job) -> int:
    """How often each film stands in a converted set."""
    manifest = read_manifest(job.settings.shards)
    return max(1, -(-EPOCH // manifest.rows(job.settings.split)))


@contextmanager
def spdl(job: Job) -> Iterator[Iterator[torch.Tensor]]:
    """Shards read whole and parsed by its tar reader, films through a function in a pipeline's threads, normalised as a
    batch: of what was tried (FilmTransform, its own FFmpeg decoder and filters), the fastest with the right filter."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    tars, steps = shard_paths(job.settings, ".tar"), _BatchTransform(job.settings)

    def jpegs() -> Iterator[bytes]:
        while True:
            for tar in random.sample(tars, len(tars)):
                members = spdl.io.iter_tarfile(tar.read_bytes())
                yield from (bytes(content) for name, content in members if name.endswith(".jpg"))

    torch.set_num_threads(1)
    pipeline = (
        PipelineBuilder()
        .add_source(jpegs())
        .pipe(steps.shrink, concurrency=job.workers)
        .aggregate(job.settings.batch_size, drop_last=True)
        .pipe(steps.finish)
        .add_sink(3)
        .build(num_threads=job.workers)
    )
    with pipeline.auto_stop():
        yield (images.permute(0, 3, 1, 2).to(job.device) for images in pipeline)


class _BatchTransform:
    """What FilmTransform does, with few calls from Python a film: threads share the interpreter's lock."""

    def __init__(self, settings: LoaderConfig) -> None:
        self._settings, self._normalise = settings, Normalise(settings.mean, settings.std)

    def shrink(self, content: bytes) -> torch.Tensor:
        """A JPEG -> (S, S) uint8."""
        import simplejpeg
        from torchvision.transforms import RandomResizedCrop

        film = torch.from_numpy(simplejpeg.decode_jpeg(content, "GRAY"))[None, None, ..., 0]
        y, x, h, w = RandomResizedCrop.get_params(film[0], list(self._settings.scale), list(ASPECT))
        size = (self._settings.image_size, self._settings.image_size)
        crop = film[..., y : y + h, x : x + w]
        small = torch.nn.functional.interpolate(crop, size, mode="bicubic", antialias=True)[0, 0]
        return small.flip(1) if random.random() < self._settings.flip else small

    def finish(self, films: list[torch.Tensor]) -> torch.Tensor:
        """(B, S, S, 3) float32."""
        grey = torch.stack(films).float()
        out = torch.empty(*grey.shape, 3)
        for channel, (gain, bias) in enumerate(zip(self._normalise.gain, self._normalise.bias, strict=True)):
            torch.add(bias, grey, alpha=gain, out=out[..., channel])
        return out


def write_streaming(job: Job) -> None:
    """Films as MDS shards."""
    from streaming import MDSWriter

    with MDSWriter(out=str(job.data), columns={"jpg": "bytes", "txt": "str"}) as out:
        for jpg, text in films(job):
            out.write({"jpg": jpg, "txt": text})


@contextmanager
def streaming(job: Job) -> Iterator[Iterator[torch.Tensor]]:
    """StreamingDataset in the workers of a DataLoader, which persist."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    transform = FilmTransform(job.settings)

    class Films(StreamingDataset):
        def __getitem__(self, at: Any) -> torch.Tensor:
            return transform(super().__getitem__(at)["jpg"])

    size = job.settings.batch_size
    dataset = Films(local=str(job.data), shuffle=True, batch_size=size, epoch_size=EPOCH if repeated(job) > 1 else None)
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        dataset, batch_size=size, num_workers=job.workers, persistent_workers=True, drop_last=True
    )
    yield _endless(job, loader)


def write_litdata(job: Job) -> None:
    """Films as LitData chunks."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(job.data), chunk_bytes=64 << 20)
    for at, (jpg, _) in enumerate(film for _ in range(repeated(job)) for film in films(job)):
        writer.add_item(at, jpg)
    writer.done()
    writer.merge()


@contextmanager
def litdata(job: Job) -> Iterator[Iterator[torch.Tensor]]:
    """Its StreamingDataset and StreamingDataLoader, which persist; it maps its chunks."""
    from litdata import StreamingDataLoader, StreamingDataset

    transform = FilmTransform(job.settings)

    class Films(StreamingDataset):
        def __getitem__(self, index: Any) -> torch.Tensor:
            return transform(super().__getitem__(index))

    dataset = Films(str(job.data), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(
        dataset, batch_size=job.settings.batch_size, num_workers=job.workers, persistent_workers=True
    )
    yield _endless(job, loader)


def write_ffcv(job: Job) -> None:
    """Films as raw RGB: it has no grey images, and its raw ones are faster than its JPEGs."""
    import simplejpeg
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Films(list[bytes]):
        def __getitem__(self, at: Any) -> Any:
            return simplejpeg.decode_jpeg(super().__getitem__(at), "RGB"), at

    writer = DatasetWriter(
        str(job.data / "films.beton"), {"image": RGBImageField(write_mode="raw"), "label": IntField()}, num_workers=2
    )
    writer.from_indexed_dataset(Films(jpg for jpg, _ in films(job)))


@contextmanager
def ffcv(job: Job) -> Iterator[Iterator[torch.Tensor]]:
    """Its compiled pipeline, over the mapped file where that is allowed, else with its own cache of pages."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    if not job.mapped:
        _read_by_the_process()
    settings = job.settings
    mean, std = (255 * np.array(each) for each in (settings.mean, settings.std))
    size = (settings.image_size, settings.image_size)
    steps = [
        RandomResizedCropRGBImageDecoder(size, scale=settings.scale, ratio=ASPECT),
        RandomHorizontalFlip(settings.flip),
        NormalizeImage(mean, std, np.float32),
        ToTensor(),
        ToTorchImage(),
    ]
    count = read_manifest(settings.shards).rows(settings.split)
    loader = Loader(
        str(job.data / "films.beton"),
        batch_size=settings.batch_size,
        num_workers=job.workers,
        os_cache=job.mapped,
        order=OrderOption.RANDOM if job.mapped else OrderOption.QUASI_RANDOM,
        indices=np.tile(np.arange(count), repeated(job)) if job.mapped else None,
        drop_last=True,
        pipelines={"image": steps, "label": None},
    )
    yield _endless(job, loader)


def _read_by_the_process() -> None:
    """Have FFCV call the process's `pread`: it looks the function up in its own library, past a slow file system."""
    import ctypes

    from ffcv import libffcv

    found = ctypes.CDLL(None).pread
    found.argtypes = libffcv.read_c.argtypes
    libffcv.read_c = found


def _endless(job: Job, loader: Any) -> Iterator[torch.Tensor]:
    """(B, 3, S, S) epoch after epoch."""
    while True:
        for batch in loader:
            images = batch[0] if isinstance(batch, tuple | list) else batch
            if images.shape[1] != 3:
                images = images.permute(0, 3, 1, 2)
            yield images.to(job.device, non_blocking=True)


LOADERS: dict[str, Callable[[Job], Any]] = {"spdl": spdl, "streaming": streaming, "litdata": litdata, "ffcv": ffcv}
"""By the name of their case."""
WRITERS: dict[str, Callable[[Job], None]] = {"streaming": write_streaming, "litdata": write_litdata, "ffcv": write_ffcv}
"""What makes their data; a peer without one reads the shards."""
