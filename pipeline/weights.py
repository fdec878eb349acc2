"""The weights of torch's uint8 bicubic resize with antialias, bit for bit.

As `_upsample_bicubic2d_aa` has them (UpSampleKernel.cpp; Pillow's Resample.c before it): the cubic with a = -0.5,
stretched over the input where that is larger, as int16 of the highest precision that fits.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """How n pixels of a row or column become `size`."""

    table: NDArray[np.int32]
    """(size, 1 + taps): first input pixel, then the weights; a weight beyond the input is 0."""
    shift: int
    """The weights are multiples of 2 ** -shift."""
    address: tuple[int, int, int]
    """Address of the table, taps, shift: what compiled code takes. Valid as long as the object is."""


@lru_cache(maxsize=4096)
def axis(n: int, size: int) -> Axis:
    """The weights of a resize of n pixels to `size`, quantised as aten does it."""
    scale = n / size
    stretch = max(scale, 1.0)
    support = 2 * stretch
    center = scale * (np.arange(size) + 0.5)
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    count = np.minimum((center + support + 0.5).astype(np.int64), n) - first
    tap = np.arange(int(count.max()))
    weights = _cubic((tap + first[:, None] - center[:, None] + 0.5) / stretch) * (tap < count[:, None])
    weights /= np.add.accumulate(weights, axis=1)[:, -1:]  # summed in order, as aten does
    shift = _precision(float(weights.max()))
    whole = np.trunc(np.copysign(0.5, weights) + weights * (1 << shift))
    table = np.concatenate([first[:, None], whole], axis=1).astype(np.int32)
    return Axis(table=table, shift=shift, address=(table.ctypes.data, len(tap), shift))


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic with a = -0.5."""
    a, x = -0.5, np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _precision(largest: float) -> int:
    """The most bits with which the largest weight is still an int16."""
    return next((bits for bits in range(22) if int(0.5 + largest * (1 << (bits + 1))) >= 1 << 15), 22)
