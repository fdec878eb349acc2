"""The baselines: what a lab has now, a map-style `Dataset` over one HDF5 file under a `DataLoader` with processes.

They read the file that the shards were made from, row by row, and take order, crops, flips, tokens and labels from the
same functions as the other backends, so a batch differs by the JPEG alone (and, in `hdf5`, by not rounding the resize).
No straw men: both get the same workers as the others get threads, `prefetch_factor` as much ahead, pinned memory
for a GPU, workers that persist, one lazily opened handle a worker, tokens and labels from memory instead of text parsed
an item at a time.

- `hdf5` does what CheXzero and the recipe do with an item: float32 as stored, repeated to three channels, then cropped,
  resized, flipped and normalised by torchvision. Its batches stay in the NCHW layout that comes out of this: turning
  them would charge it for a copy its users do not make.
- `hdf5-tuned` is what a good engineer makes of that without changing the file: grey levels to uint8 (a quarter of the
  bytes, and torchvision's fastest resize), one channel through crop, resize and flip, normalisation and expansion last
  and in one pass, straight to channels_last. In the workers: done by the trainer's process, after one channel between
  processes, the same step cost more time than it saved, for there it competes with the workers and the trainer.
"""

import gc
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_start_method
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from xxhash import xxh3_64_intdigest

from ingest.source import H5Source
from pipeline.augment import decide
from pipeline.batch import Batch, World, make_batch
from pipeline.config import LoaderConfig, thread_count
from pipeline.effects import apply
from pipeline.encoded import rank_positions
from pipeline.handles import Records, block_records
from pipeline.kernels import Normalise
from pipeline.order import Order
from shards.encodings import ENCODINGS, decode, encode
from shards.errors import InputError
from shards.processes import die_with_parent
from shards.reader import ShardReader
from shards.schema import Manifest

CHECKED_FILMS = 24
"""Films compared with the shards' when a loader is opened: 1.5 ms each."""
ALIKE_LEVELS = 3.0
"""Mean difference, in grey levels, within which two JPEGs are of one film. Two DCTs of libjpeg-turbo differ by up to
0.6 on NIH's films and 1.0 on the tests' noise; a film and its mirror image, the closest other one, by 12 and more."""

Item = tuple[int, list[int], bool, NDArray[np.float32] | None]
"""Row in the HDF5 file, crop box (y, x, h, w), flip, numbers of `pipeline.effects`."""


class FilmDataset(Dataset):
    """One film a time from an HDF5 file. Each worker opens its own handle at its first item."""

    def __init__(self, path: Path, config: LoaderConfig, *, tuned: bool) -> None:
        self._path, self._config, self._tuned = path, config, tuned
        self._normalise = Normalise(config.mean, config.std)
        self._source: H5Source | None = None

    def __getitem__(self, item: Item) -> torch.Tensor:
        """(3, S, S) float32 normalised; tuned: (S, S, 3), so that collation copies it as it lies."""
        row, (y, x, h, w), flipped, effects = item
        if self._source is None:
            self._source = H5Source(self._path, self._config.h5_dataset)
        film = self._source.read(row, row + 1)
        if effects is not None:
            film = apply(film[0].astype(np.uint8), effects)[None]
        if self._tuned:
            image = torch.from_numpy(film.astype(np.uint8, copy=False))
        else:
            image = torch.from_numpy(np.repeat(film.astype(np.float32, copy=False), 3, axis=0)).div_(255)
        size = [self._config.image_size] * 2
        image = transforms.resized_crop(image, y, x, h, w, size, InterpolationMode.BICUBIC, antialias=True)
        if flipped:
            image = transforms.horizontal_flip(image)
        if self._tuned:
            return self._normalise_and_expand(image[0])
        return transforms.normalize(image, list(self._config.mean), list(self._config.std), inplace=True)

    def _normalise_and_expand(self, grey: torch.Tensor) -> torch.Tensor:
        out = torch.empty(*grey.shape, 3)
        self._normalise.write(grey.float(), out)
        return out


@dataclass(frozen=True, slots=True)
class _Plan:
    """One batch before its images."""

    position: int
    records: Records


class Hdf5Backend:
    """Plans batches here, has workers make the images."""

    def __init__(
        self, config: LoaderConfig, manifest: Manifest, world: World, order: Order, position: int, tuned: bool
    ) -> None:
        assert config.h5 is not None
        check_file(config, manifest)
        self._config, self._manifest, self._world, self._order = config, manifest, world, order
        self._device = torch.device(world.device)
        self._tuned = tuned
        self._table = read_split(config, manifest)
        check_films(config, manifest, self._table)
        self._first_row = np.concatenate([[0], np.cumsum([shard.rows for shard in manifest.splits[config.split]])])
        self._plans: deque[_Plan] = deque()
        workers = thread_count(config, world)
        loader = DataLoader(
            FilmDataset(Path(config.h5), config, tuned=tuned),
            batch_sampler=self._plan_batches(position),
            num_workers=workers,
            prefetch_factor=max(2, -(-config.ahead // workers)),
            persistent_workers=True,
            pin_memory=self._device.type == "cuda",
            collate_fn=_stack,
            worker_init_fn=partial(_follow, None if get_start_method() == "forkserver" else os.getpid()),
        )
        gc.collect()  # before the fork: a child hangs where it destroys what has threads, such as a DALI graph
        self._images = iter(loader)

    def next(self) -> Batch:
        """The next batch. StopIteration after the last."""
        try:
            images = next(self._images)
        except InputError as error:  # arrives wrapped in the worker's traceback
            raise InputError(str(error).strip().splitlines()[-1].removeprefix("shards.errors.InputError: ")) from None
        plan = self._plans.popleft()
        if not len(plan.records):
            images = torch.empty(0, 3, self._config.image_size, self._config.image_size)
        elif self._tuned:
            images = images.permute(0, 3, 1, 2)
        images = images.to(self._device, getattr(torch, self._config.dtype), non_blocking=True)
        return make_batch(images, plan.records, plan.position, self._device)

    def close(self) -> None:
        """Stop the workers."""
        if (shutdown := getattr(self._images, "_shutdown_workers", None)) is not None:
            shutdown()

    def _plan_batches(self, position: int) -> Iterator[list[Item]]:
        """Items of the rank's batches from a position on; each batch's plan is queued for `next`."""
        end = self._order.samples if self._config.mode == "eval" else None
        while end is None or position < end:
            stop = position + self._config.batch_size
            positions = rank_positions(position, min(stop, end or stop), self._world)
            places = self._order.locate(positions)
            records = self._table[self._first_row[places.shard] + places.row]
            fate = decide(self._config, self._manifest, positions, records["side_words"])
            self._plans.append(_Plan(position, records))
            effects = [None] * len(fate.boxes) if fate.effects is None else list(fate.effects)
            row = records["source_row"].tolist() * self._config.images_a_sample
            yield list(zip(row, fate.boxes.tolist(), fate.flipped.tolist(), effects, strict=True))
            position = stop


def _follow(parent: int | None, worker: int) -> None:  # noqa: ARG001
    """End a worker with its parent. torch's own watch takes whoever is the parent once the worker is set up: where that
    was killed before, the worker would live for ever. `parent` None: a fork server, which ends with the rank itself."""
    die_with_parent()
    if parent not in (None, os.getppid()):  # it died before we asked
        os._exit(1)


def check_file(config: LoaderConfig, manifest: Manifest) -> None:
    """InputError where the HDF5 file cannot be the one that the shards were made from."""
    if len(manifest.sources) != 1 or manifest.sources[0].kind != "hdf5":
        raise InputError("the hdf5 backends need shards that were made from one HDF5 file; use --backend cpu")
    assert config.h5 is not None
    with H5Source(config.h5, config.h5_dataset) as source:
        if source.dtype not in (np.float32, np.uint8):
            raise InputError(f"{config.h5} has dtype {source.dtype}, which the hdf5 backends do not scale; use cpu")
        found, expected = (source.rows, source.height, source.width), (
            manifest.sources[0].rows, manifest.image.height, manifest.image.width,
        )  # fmt: skip
    if found != expected:
        raise InputError(f"{config.h5} has shape {found}, the shards were made from {expected}; give the right file")


def check_films(config: LoaderConfig, manifest: Manifest, table: Records) -> None:
    """InputError where films of the HDF5 file, some of all the split's, are not those that the shards hold.

    Encoded as ingest does it, a film has the digest that its row says. Where it has not, another version of the encoder
    may be the reason, so that the decoded images are compared as well.
    """
    assert config.h5 is not None
    chosen = np.unique(np.linspace(0, len(table) - 1, CHECKED_FILMS).astype(int))
    with H5Source(config.h5, config.h5_dataset) as source:
        for row in chosen[np.argsort(table["source_row"][chosen])].tolist():
            number = int(table["source_row"][row])
            film = source.read(number, number + 1)[0]
            grey = film.astype(np.uint8)
            if (grey != film).any():
                raise InputError(f"row {number} of {config.h5} is not in whole grey levels 0..255; use --backend cpu")
            encoded = encode(grey, manifest.image)
            if xxh3_64_intdigest(encoded) != table["xxh3"][row] and not _alike(encoded, config, manifest, table, row):
                raise InputError(
                    f"row {number} of {config.h5} is not the film that the shards have from that row; give the file "
                    "they were made from, or use --backend cpu"
                )


def _alike(encoded: bytes, config: LoaderConfig, manifest: Manifest, table: Records, row: int) -> bool:
    """Whether an encoded film looks like what the shards have in a row of the split."""
    first = 0
    for info in manifest.splits[config.split]:
        if row < first + info.rows:
            break
        first += info.rows
    with ShardReader(Path(config.shards), manifest, info) as reader:
        stored = os.pread(reader.fd, int(table["size"][row]), int(table["offset"][row]))
    if xxh3_64_intdigest(stored) != table["xxh3"][row]:
        return True  # the shard is damaged, not the file another one: not what is asked here
    difference = decode(stored, manifest.image).astype(np.float32) - decode(encoded, manifest.image)
    return float(np.abs(difference).mean()) <= (0 if ENCODINGS[manifest.image.codec].lossless else ALIKE_LEVELS)


def read_split(config: LoaderConfig, manifest: Manifest) -> Records:
    """All rows of the split in order, in memory, as a lab's CSV would be."""
    blocks = []
    for number, info in enumerate(manifest.splits[config.split]):
        with ShardReader(Path(config.shards), manifest, info) as reader:
            for block in range(reader.blocks):
                records = block_records(reader.read_rows(block), manifest, block * manifest.block_rows)
                records["shard"], records["planned"] = number, records["row"]
                blocks.append(records)
    return np.concatenate(blocks)


def _stack(images: list[torch.Tensor]) -> torch.Tensor:
    return default_collate(images) if images else torch.empty(0)  # a rank may have no row in an evaluation's last batch
