"""One rank's batches before decoding: encoded images with everything that decides what becomes of them.

    order -> visits -> BlockReader -> EncodedBatches -> a backend decodes

A visit's rows stand `step` positions apart and a rank's batch is a range of positions `world` apart, so a visit fills a
batch by plain slices: no loop over samples.
"""

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

    def __iter__(self) -> "EncodedBatches":
        return self

    def __next__(self) -> Encoded:
        """The next batch; may be empty on a rank at the end of an evaluation."""
        if self._end is not None and self._position >= self._end:
            raise StopIteration
        begin, end = self._position, self._position + self._config.batch_size
        self._position = end
        positions = rank_positions(begin, min(end, self._end or end), self._world)
        self._gather(end)
        columns = _Columns(len(positions), self._manifest)
        for loaded in self._live:
            columns.fill(loaded, positions, self._world.size)
        fate = decide(self._config, self._manifest, positions, columns.side_words)
        finished = [loaded for loaded in self._live if loaded.visit.last < end]
        self._live = [loaded for loaded in self._live if loaded.visit.last >= end]
        return Encoded(
            position=begin,
            images=columns.images,
            fate=fate,
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
        columns.fill(loaded, np.array([position]), 1)
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

    def _gather(self, end: int) -> None:
        """Take the visits that start before a position."""
        while (first := self._reader.next_first()) is not None and first < end:
            self._live.append(self._reader.get())


class _Columns:
    """The arrays of one batch while visits fill them."""

    def __init__(self, count: int, manifest: Manifest) -> None:
        self.images: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * count
        self.samples = np.empty((count, 2), dtype=np.int64)
        self.planned = np.empty(count, dtype=np.int64)
        self.sources = np.empty((count, 2), dtype=np.int64)
        self.tokens = np.empty((count, manifest.tokenizer.context), dtype=np.int64)
        self.token_count = np.empty(count, dtype=np.int64)
        self.side_words = np.empty(count, dtype=bool)
        self.labels = np.empty((count, len(manifest.labels)), dtype=np.float32)

    def fill(self, loaded: Loaded, positions: NDArray[np.int64], ranks: int) -> None:
        """Copy the visit's rows that belong to these positions of a rank."""
        visit = loaded.visit
        if not len(positions) or visit.first > positions[-1]:
            return
        skipped = max(0, -(-(int(positions[0]) - visit.first) // visit.step))
        first = visit.first + skipped * visit.step
        count = min(len(visit.rows) - skipped, (int(positions[-1]) - first) // visit.step + 1)
        if count <= 0:
            return
        begin, stride = (first - int(positions[0])) // ranks, visit.step // ranks
        into = slice(begin, begin + (count - 1) * stride + 1, stride)
        of = slice(skipped, skipped + count)
        self.images[into] = loaded.images[of]
        self.samples[into, 0] = visit.shard
        self.samples[into, 1] = loaded.shard_rows[of]
        self.planned[into] = loaded.planned[of]
        self.sources[into, 0] = loaded.rows.source[of]
        self.sources[into, 1] = loaded.rows.source_row[of]
        self.tokens[into] = loaded.rows.tokens[of]
        self.token_count[into] = loaded.rows.token_count[of]
        self.side_words[into] = loaded.rows.side_words[of]
        self.labels[into] = loaded.rows.labels[of]
