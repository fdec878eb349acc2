"""Loaders of others over the very same shards: plain webdataset, and DALI's own webdataset reader.

Neither is a straw man: each does what its documentation advises, one channel until the last step, in as many workers or
threads as ours. In their favour: random crops and flips are drawn as they like, reports stay text, nothing is checked.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.batch import World
from pipeline.config import LoaderConfig, thread_count
from pipeline.kernels import Normalise
from shards.errors import InputError
from shards.manifest import read_manifest

ASPECT = (3 / 4, 4 / 3)
"""Range of torchvision's RandomResizedCrop."""
SHUFFLED = 1000
"""Samples in a shuffle buffer, as in webdataset's and DALI's examples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a loader of others is to do."""

    settings: LoaderConfig
    """Shards, batch, threads, crop, flip, statistics."""
    data: Path
    """Folder with the films in the loader's own format, for one that has its own."""
    device: str
    """cpu or cuda."""
    mapped: bool = True
    """Whether files may be mapped into memory; a slow file system cannot delay those that are."""

    @property
    def workers(self) -> int:
        """Worker processes, or threads."""
        return thread_count(self.settings, World())


class FilmTransform:
    """A JPEG's bytes -> (S, S, 3) float32: libjpeg-turbo, then torchvision on one channel; as `hdf5-tuned` does it."""

    def __init__(self, settings: LoaderConfig) -> None:
        self._scale, self._flip = list(settings.scale), settings.flip
        self._size = [settings.image_size] * 2
        self._normalise = Normalise(settings.mean, settings.std)

    def __call__(self, content: bytes) -> torch.Tensor:
        import simplejpeg
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as transforms

        image = torch.from_numpy(simplejpeg.decode_jpeg(content, "GRAY")).permute(2, 0, 1)
        box = RandomResizedCrop.get_params(image, self._scale, list(ASPECT))
        image = transforms.resized_crop(image, *box, self._size, InterpolationMode.BICUBIC, antialias=True)
        if random.random() < self._flip:
            image = transforms.horizontal_flip(image)
        out = torch.empty(*self._size, 3)
        self._normalise.write(image[0].float(), out)
        return out


def shard_paths(settings: LoaderConfig, suffix: str) -> list[Path]:
    """Files of the split. InputError where the films are not JPEG."""
    manifest = read_manifest(settings.shards)
    if manifest.image.codec != "jpeg":
        raise InputError(f"{settings.shards} holds {manifest.image.codec} images; loaders of others are given JPEG")
    return [Path(settings.shards, info.name + suffix) for info in manifest.splits[settings.split]]


@contextmanager
def webdataset(job: Job) -> Iterator[Iterator[torch.Tensor]]:
    """WebDataset -> shuffle -> FilmTransform -> batched, in the workers of a WebLoader. Shards with replacement, as its
    documentation has it for training: also fewer shards than workers then keep all of them busy."""
    import webdataset as wds

    transform = FilmTransform(job.settings)
    dataset = (
        wds.WebDataset([str(path) for path in shard_paths(job.settings, ".tar")], resampled=True, shardshuffle=False)
        .shuffle(SHUFFLED)
        .to_tuple("jpg", "txt")
        .map_tuple(transform, bytes.decode)
        .batched(job.settings.batch_size, collation_fn=_stack, partial=False)
    )
    pinned = job.device == "cuda"
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=job.workers, prefetch_factor=2, pin_memory=pinned)
    batches = iter(loader)
    try:
        yield (images.permute(0, 3, 1, 2).to(job.device, non_blocking=True) for images, _ in batches)
    finally:
        del batches


def _stack(samples: Sequence[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, list[str]]:
    """In a worker: straight into shared memory, as torch's own collation does it."""
    from torch.utils.data import default_collate

    images, texts = zip(*samples, strict=True)
    return default_collate(list(images)), list(texts)


@contextmanager
def dali_reader(job: Job) -> Iterator[Iterator[torch.Tensor]]:
    """fn.readers.webdataset -> decode of the crop only -> cubic resize -> flip, normalise; the end is our graph's."""
    graph = _reader_graph(job)
    graph.build()
    # Bound to the stream that takes its batches, as ours is: otherwise the host waits for each of them.
    stream = torch.cuda.current_stream() if job.device == "cuda" else None
    yield iter(lambda: torch.from_dlpack(graph.run(stream)[0].as_tensor()).permute(0, 3, 1, 2), None)


def _reader_graph(job: Job) -> Any:
    import nvidia.dali

    dali: Any = nvidia.dali  # its stubs do not know the values that its types get at run time
    fn, pipeline_def, types = dali.fn, dali.pipeline_def, dali.types
    settings, gpu = job.settings, job.device == "cuda"
    tars, indexes = (list(map(str, shard_paths(settings, suffix))) for suffix in (".tar", ".idx"))

    @pipeline_def(batch_size=settings.batch_size, num_threads=job.workers, device_id=0 if gpu else None)
    def graph() -> Any:
        encoded, text = fn.readers.webdataset(
            paths=tars,
            index_paths=indexes,
            ext=["jpg", "txt"],
            random_shuffle=True,
            initial_fill=SHUFFLED,
            missing_component_behavior="error",
            dont_use_mmap=not job.mapped,
        )
        crop = fn.decoders.image_random_crop(
            encoded,
            device="mixed" if gpu else "cpu",
            output_type=types.GRAY,
            random_area=list(settings.scale),
            random_aspect_ratio=list(ASPECT),
        )
        small = fn.resize(
            crop, size=[settings.image_size] * 2, interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.UINT8
        )
        images = fn.crop_mirror_normalize(
            fn.cat(small, small, small, axis=2),
            mirror=fn.random.coin_flip(probability=settings.flip),
            mean=[255 * each for each in settings.mean],
            std=[255 * each for each in settings.std],
            output_layout="HWC",
            dtype=types.FLOAT,
        )
        return images, text

    return graph()


LOADERS: dict[str, Callable[[Job], Any]] = {"webdataset": webdataset, "dali reader": dali_reader}
"""By the name of their case."""
