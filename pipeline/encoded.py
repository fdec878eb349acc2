"""One rank's batches before decoding: encoded images with everything that decides what becomes of them.

    order -> visits -> BlockReader -> EncodedBatches -> a backend decodes

A visit's rows stand `step` positions apart and a rank's batch is a range of positions `world` apart. So a visit, when
it comes, is laid out in a window over the positions to come, and a batch is cut off the window's front: work for each
visit and each batch, none for each visit in each batch.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.augment import crop_boxes, flips, guard_flips, view_seed, whole_boxes
from pipeline.batch import Batch, World
from pipeline.blocks import BlockReader
from pipeline.config import LoaderConfig
from pipeline.effects import draw
from pipeline.mixture import MixedReader
from pipeline.order import Visit
from pipeline.visits import Loaded
from shards.schema import Manifest, sample_key, shard_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Fate:
    """What becomes of n images; with several views of m samples, view v of sample i is image v * m + i."""

    boxes: NDArray[np.int64]
    """(n, 4) crop boxes: y, x, h, w in pixels."""
    flipped: NDArray[np.bool_]
    """(n,) left to right after the crop."""
    effects: NDArray[np.float32] | None = None
    """(n, 4) what `pipeline.effects` does to the films before the crop; None: nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """n samples of one rank's batch. `images` are views that end with `EncodedBatches.release`."""

    position: int
    """First position of the global batch."""
    images: list[NDArray[np.uint8]]
    """n encoded images."""
    fate: Fate
    """Crops, flips and effects of each view."""
    samples: NDArray[np.int64]
    """(n, 2) shard, row."""
    planned: NDArray[np.int64]
    """(n,) row that the order names; not that of `samples` where it is bad."""
    sources: NDArray[np.int64]
    """(n, 2) source, row in it: the sample's opaque key."""
    tokens: NDArray[np.int64]
    """(n, context)."""
    token_count: NDArray[np.int64]
    """(n,)."""
    labels: NDArray[np.float32]
    """(n, labels)."""
    finished: list[Loaded]
    """Visits that end in this batch."""

    def __len__(self) -> int:
        return len(self.images)

    def describe(self, index: int, split: str) -> str:
        """Shard and opaque key of a sample, for an error message."""
        (shard, row), (source, source_row) = self.samples[index].tolist(), self.sources[index].tolist()
        return f"shard {shard_name(split, shard)}: image {sample_key(source, source_row)} (row {row})"

    def batch(self, images: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor) -> Batch:
        """The decoded batch, with these tensors on the device."""
        return Batch(
            images=images,
            tokens=tokens,
            labels=labels,
            samples=torch.from_numpy(self.samples),
            position=self.position,
            text_length=int(self.token_count.max(initial=0)),
            replaced=np.stack([self.samples[:, 0], self.planned], axis=1)[self.samples[:, 1] != self.planned],
        )


def decide(config: LoaderConfig, manifest: Manifest, positions: NDArray[np.int64], side: NDArray[np.bool_]) -> Fate:
    """Fate of all views at positions (n,) whose reports name a side or not (n,), as the config asks."""
    size = {"height": manifest.image.height, "width": manifest.image.width}
    if config.mode == "eval":
        return Fate(boxes=whole_boxes(len(positions), **size), flipped=np.zeros(len(positions), dtype=bool))
    seeds = [view_seed(config.seed, view) for view in range(config.views)]
    flipped = np.stack([flips(seed, positions, probability=config.flip) for seed in seeds])
    boxes = [crop_boxes(seed, positions, **size, scale=config.scale) for seed in seeds]
    effects = [draw(config.effects, seed, positions) for seed in seeds] if config.changes_films else None
    return Fate(
        boxes=np.concatenate(boxes),
        flipped=(guard_flips(flipped, side) if config.flip_guard else flipped).ravel(),
        effects=None if effects is None else np.concatenate(effects),
    )


def rank_positions(position: int, end: int, world: World) -> NDArray[np.int64]:
    """A rank's positions in the global batch [position, end), (n,); `position` is a multiple of the world's size."""
    return np.arange(position + world.rank, end, world.size, dtype=np.int64)


class EncodedBatches:
    """Iterates over one rank's batches from a position on; in evaluation mode until every row was there."""

    def __init__(
        self,
        config: LoaderConfig,
        manifest: Manifest,
        world: World,
        reader: BlockReader | MixedReader,
        position: int,
        samples: int,
    ) -> None:
        """`samples` is the number of rows in the order, where an evaluation ends."""
        self._config, self._manifest, self._world, self._reader = config, manifest, world, reader
        self._position = position
        self._end = samples if config.mode == "eval" else None
        self._live: list[Loaded] = []
        self._window = _Columns(_WINDOW, manifest)

    def __iter__(self) -> "EncodedBatches":
        return self

    def __next__(self) -> Encoded:
        """The next batch; may be empty on a rank at the end of an evaluation."""
        if self._end is not None and self._position >= self._end:
            raise StopIteration
        begin, end = self._position, self._position + self._config.batch_size
        self._position = end
        positions = rank_positions(begin, min(end, self._end or end), self._world)
        self._gather(begin, end)
        columns = self._window.take(self._numbers(positions))
        finished = [loaded for loaded in self._live if loaded.visit.last < end]
        self._live = [loaded for loaded in self._live if loaded.visit.last >= end]
        return Encoded(
            position=begin,
            images=columns.images,
            fate=decide(self._config, self._manifest, positions, columns.side_words),
            samples=columns.samples,
            planned=columns.planned,
            sources=columns.sources,
            tokens=columns.tokens,
            token_count=columns.token_count,
            labels=columns.labels,
            finished=finished,
        )

    def release(self, encoded: Encoded) -> None:
        """Give back what ended with this batch. In the batches' order: earlier ones may have used the same visits."""
        for loaded in encoded.finished:
            self._reader.release(loaded)
        encoded.finished.clear()

    def replace(self, encoded: Encoded, index: int, error: Exception) -> NDArray[np.uint8]:
        """Put the next good row of its block in the place of a sample that cannot be decoded; returns its image.

        InputError where no bad sample is tolerated. Several threads may call it, for different samples.
        """
        shard, row = encoded.samples[index].tolist()
        self._reader.retire(shard, row, f"cannot be decoded ({error})")
        position = encoded.position + self._world.rank + index * self._world.size
        block, within = divmod(int(encoded.planned[index]), self._manifest.block_rows)
        visit = Visit(first=position, step=1, shard=shard, block=block, rows=np.array([within]))
        loaded = self._reader.load_one(visit)
        columns = _Columns(1, self._manifest)
        columns.put(loaded, np.array([0]))
        image = columns.images[0].copy()
        self._reader.release(loaded)
        self._put(encoded, index, image, columns)
        return image

    def _put(self, encoded: Encoded, index: int, image: NDArray[np.uint8], columns: "_Columns") -> None:
        """Overwrite a sample with the only one of `columns`. Its crops are its position's, as ever."""
        position = np.array([encoded.position + self._world.rank + index * self._world.size])
        encoded.images[index] = image
        fate = decide(self._config, self._manifest, position, columns.side_words)
        encoded.fate.flipped[index :: len(encoded)] = fate.flipped
        for name in ("samples", "sources", "tokens", "token_count", "labels"):
            getattr(encoded, name)[index] = getattr(columns, name)[0]

    def _gather(self, begin: int, end: int) -> None:
        """Take the visits that start before `end` and lay them out. None of them starts before `begin`."""
        while (first := self._reader.next_first()) is not None and first < end:
            loaded = self._reader.get()
            self._live.append(loaded)
            if (loaded.visit.last - begin) // self._world.size >= len(self._window):
                self._widen(loaded.visit.last - begin)
            else:
                self._lay_out(loaded)

    def _widen(self, span: int) -> None:
        """A window for so many positions at least, with all that is under way in it."""
        count = len(self._window)
        while count <= span // self._world.size:
            count *= 2
        self._window = _Columns(count, self._manifest)
        for loaded in self._live:
            self._lay_out(loaded)

    def _lay_out(self, loaded: Loaded) -> None:
        visit = loaded.visit
        positions = visit.first + visit.step * np.arange(len(visit.rows), dtype=np.int64)
        self._window.put(loaded, self._numbers(positions))

    def _numbers(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of this rank's samples at positions (n,), counted from position 0."""
        return positions // self._world.size


_WINDOW = 1024
"""Samples of this rank that the window has room for at first."""
_ARRAYS = ("samples", "planned", "sources", "tokens", "token_count", "side_words", "labels")


class _Columns:
    """What is known of so many samples; sample number n stands at n modulo their count."""

    def __init__(self, count: int, manifest: Manifest) -> None:
        self.images: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * count
        self.samples = np.empty((count, 2), dtype=np.int64)
        self.planned = np.empty(count, dtype=np.int64)
        self.sources = np.empty((count, 2), dtype=np.int64)
        self.tokens = np.empty((count, manifest.tokenizer.context), dtype=np.int64)
        self.token_count = np.empty(count, dtype=np.int64)
        self.side_words = np.empty(count, dtype=bool)
        self.labels = np.empty((count, len(manifest.labels)), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.images)

    def put(self, loaded: Loaded, numbers: NDArray[np.int64]) -> None:
        """Lay out the rows of a visit, whose samples have these numbers."""
        into, rows = numbers % len(self), loaded.rows
        for place, image in zip(into.tolist(), loaded.images, strict=True):
            self.images[place] = image
        self.samples[into, 0] = loaded.visit.shard
        self.samples[into, 1] = loaded.shard_rows
        self.planned[into] = loaded.planned
        self.sources[into, 0] = rows.source
        self.sources[into, 1] = rows.source_row
        for name in ("tokens", "token_count", "side_words", "labels"):
            getattr(self, name)[into] = getattr(rows, name)

    def take(self, numbers: NDArray[np.int64]) -> "_Columns":
        """A copy of the samples with these numbers."""
        places = numbers % len(self)
        taken = copy.copy(self)
        taken.images = [self.images[place] for place in places.tolist()]
        for name in _ARRAYS:
            setattr(taken, name, getattr(self, name)[places])
        return taken
