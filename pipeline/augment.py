"""Augmentation is data: the crop box and the flip of a position are a pure function of (seed, position).

The distribution is that of torchvision's `RandomResizedCrop(scale, ratio=(3/4, 4/3))`, ten attempts and its fallback
included, and of `RandomHorizontalFlip(probability)`; the random numbers are counter-based, so that every backend, rank
count and resumed run gives the same crop. Source: torchvision/transforms/transforms.py, `RandomResizedCrop.get_params`.
"""

import math

import numpy as np
from numpy.typing import NDArray

from shards.counter import hash64, uniform

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
