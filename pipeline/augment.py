"""Augmentation is data: the crop box and the flip of a position are a pure function of (seed, position).

The distribution is that of torchvision's `RandomResizedCrop(scale, ratio=(3/4, 4/3))`, ten attempts and its fallback
included, and of `RandomHorizontalFlip(probability)`; the random numbers are counter-based, so that every backend, rank
count and resumed run gives the same crop. Source: torchvision/transforms/transforms.py, `RandomResizedCrop.get_params`.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.batch import World
from pipeline.config import LoaderConfig
from pipeline.effects import draw
from shards.counter import hash64, uniform
from shards.schema import Manifest

Ints = NDArray[np.int64]

RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10

# First words after the seed: they keep the random numbers of different uses apart (pipeline.order has 1 to 15,
# pipeline.effects 32 and up).
_AREA_WORD, _RATIO_WORD, _TOP_WORD, _LEFT_WORD, _FLIP_WORD, _VIEW_WORD = 16, 17, 18, 19, 20, 21


def view_seed(seed: int, view: int) -> int:
    """Seed of a view of a sample: a stream of random numbers of its own; the first view's is the seed itself."""
    return int(hash64(seed, _VIEW_WORD, view)) if view else seed


def crop_boxes(seed: int, positions: Ints, *, height: int, width: int, scale: tuple[float, float]) -> Ints:
    """Crop boxes of positions (n,) in images of height x width: int64 (n, 4), each y, x, h, w in pixels."""
    h, w, fits = _attempts(seed, positions, height, width, scale)
    chosen = np.argmax(fits, axis=1)
    each = np.arange(len(chosen))
    h, w, found = h[each, chosen], w[each, chosen], fits[each, chosen]
    y = _below(uniform(hash64(seed, _TOP_WORD, positions)), height - h + 1)
    x = _below(uniform(hash64(seed, _LEFT_WORD, positions)), width - w + 1)
    boxes = np.stack([y, x, h, w], axis=1)
    return np.where(found[:, None], boxes, _central_box(height, width))


def whole_boxes(count: int, *, height: int, width: int) -> Ints:
    """Boxes of `count` whole images: int64 (count, 4), each y, x, h, w in pixels."""
    return np.tile(np.array([0, 0, height, width], dtype=np.int64), (count, 1))


def flips(seed: int, positions: Ints, *, probability: float) -> NDArray[np.bool_]:
    """Whether the images at positions (n,) are flipped left to right: bool (n,)."""
    return uniform(hash64(seed, _FLIP_WORD, positions)) < probability


def guard_flips(flipped: NDArray[np.bool_], side_words: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The flips (n,) without those whose report names a side: flipped, it would say left of what is right."""
    return flipped & ~side_words


def _attempts(
    seed: int, positions: Ints, height: int, width: int, scale: tuple[float, float]
) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """Heights, widths and whether they fit, of ten attempts for each position: each (n, 10)."""
    attempt = np.arange(ATTEMPTS)
    at = np.asarray(positions)[:, None]
    area = height * width * _between(uniform(hash64(seed, _AREA_WORD, at, attempt)), *scale)
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = np.exp(_between(uniform(hash64(seed, _RATIO_WORD, at, attempt)), low, high))
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    return h, w, (w > 0) & (w <= width) & (h > 0) & (h <= height)


def _between(u: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * u


def _below(u: NDArray[np.float64], end: Ints) -> Ints:
    """Integers in [0, end), or 0 where end is not positive (an attempt that did not fit)."""
    return np.clip((u * end).astype(np.int64), 0, np.maximum(end - 1, 0))


def _central_box(height: int, width: int) -> Ints:
    """The fallback: the largest central box whose ratio lies in RATIO."""
    h, w = height, width
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return np.array([(height - h) // 2, (width - w) // 2, h, w], dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fate:
    """What becomes of n images; with several views of m samples, view v of sample i is image v * m + i."""

    boxes: NDArray[np.int64]
    """(n, 4) crop boxes: y, x, h, w in pixels."""
    flipped: NDArray[np.bool_]
    """(n,) left to right after the crop."""
    effects: NDArray[np.float32] | None = None
    """(n, 4) what `pipeline.effects` does to the films before the crop; None: nothing."""


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


DECIDED = 1024
"""Positions whose fate is decided in one go: numpy is asked as often for one batch as for many."""


class Fates:
    """What becomes of a rank's positions in training, decided for a stretch of them ahead."""

    def __init__(self, config: LoaderConfig, manifest: Manifest, world: World) -> None:
        self._config, self._manifest, self._step = config, manifest, world.size
        self._first = self._count = 0
        self._ahead = decide(config, manifest, np.empty(0, dtype=np.int64), np.empty(0, dtype=bool))

    def of(self, positions: NDArray[np.int64], side: NDArray[np.bool_]) -> Fate:
        """As `decide`; positions `step` apart."""
        if self._config.mode == "eval":
            return decide(self._config, self._manifest, positions, side)
        count = len(positions)
        at = (int(positions[0]) - self._first) // self._step
        if not 0 <= at <= self._count - count:
            self._decide(int(positions[0]), max(count, DECIDED // count * count))
            at = 0
        ahead, views = self._ahead, self._config.views

        def cut(values: NDArray) -> NDArray:
            return values.reshape(views, self._count, *values.shape[1:])[:, at : at + count].reshape(
                -1, *values.shape[1:]
            )

        flipped = cut(ahead.flipped)
        return Fate(
            boxes=cut(ahead.boxes),
            flipped=guard_flips(flipped, np.tile(side, views)) if self._config.flip_guard else flipped.copy(),
            effects=None if ahead.effects is None else cut(ahead.effects),
        )

    def _decide(self, first: int, count: int) -> None:
        self._first, self._count = first, count
        self._ahead = decide(
            self._config, self._manifest, first + self._step * np.arange(count), np.zeros(count, dtype=bool)
        )
