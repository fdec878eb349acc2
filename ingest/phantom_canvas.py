"""What the phantom's films are drawn with: smooth masks, noise from counters, and lines on a fine canvas.

Only sums, products and square roots of float32 are used on pixels (no exp, no pow), so that a film is the same on every
CPU, whatever vector units NumPy finds there. Arrays are (320, 320) float32 unless said otherwise; lengths are half film
widths in the patient's frame (phantom_case).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from ingest.phantom_case import TEXTURE, Case, Exposure
from shards.counter import hash64

SIZE = 320
_FINE = 2  # lines are drawn at twice the resolution and averaged

Array = NDArray[np.float32]
Point = tuple[float, float]
Points = list[Point]


def sign(side: str) -> int:
    """+1 where the patient's left is, on the right of the image."""
    return 1 if side == "left" else -1


def step(z: Array) -> Array:
    """Smooth step from 0 at z = -1 to 1 at z = 1."""
    t = np.clip(z * np.float32(0.5) + np.float32(0.5), 0, 1)
    return t * t * (3 - 2 * t)


def bump(r2: Array) -> Array:
    """Bell over the squared radius: 1 at 0, 0 from 1 on."""
    t = np.clip(1 - r2, 0, None)
    return t * t


class Field:
    """Smooth noise, made from counters, so that each use has its own and no order matters."""

    def __init__(self, case: Case) -> None:
        self._key = (case.seed, TEXTURE, case.index)

    def smooth(self, purpose: int, cells: int) -> Array:
        """Noise in about [-1, 1] that varies over 1/`cells` of the film."""
        grid = _signed(hash64(*self._key, purpose, np.arange(cells * cells))).reshape(cells, cells)
        return np.asarray(Image.fromarray(grid).resize((SIZE, SIZE), Image.Resampling.BICUBIC))

    def grain(self, purpose: int) -> Array:
        """Independent pixels, near Gaussian (a sum of four uniforms), standard deviation 1."""
        words = hash64(*self._key, purpose, np.arange(SIZE * SIZE)).view(np.uint16).reshape(SIZE, SIZE, 4)
        total = words[..., 0].astype(np.float32) + words[..., 1] + words[..., 2] + words[..., 3]
        return (total - np.float32(131070.0)) * np.float32(1 / 37837.2)


def _signed(hashes: NDArray[np.uint64]) -> Array:
    return (hashes >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)


@dataclass(frozen=True, slots=True)
class Frame:
    """The map between the patient's frame and the film."""

    exposure: Exposure

    def grids(self) -> tuple[Array, Array]:
        """The patient's x and y at each pixel."""
        axis = ((np.arange(SIZE, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / SIZE)) - np.float32(1)
        e, cos, sin = self.exposure, math.cos(self.exposure.roll), math.sin(self.exposure.roll)
        x, y = (axis[None, :] - e.shift[0]) / e.zoom, (axis[:, None] - e.shift[1]) / e.zoom
        return (cos * x + sin * y).astype(np.float32), (cos * y - sin * x).astype(np.float32)

    def pixels(self, points: Iterable[Point]) -> Points:
        """Patient points as (column, row) on the fine canvas."""
        e, cos, sin = self.exposure, math.cos(self.exposure.roll), math.sin(self.exposure.roll)
        half = SIZE * _FINE / 2
        return [
            (
                (e.zoom * (cos * x - sin * y) + e.shift[0] + 1) * half,
                (e.zoom * (sin * x + cos * y) + e.shift[1] + 1) * half,
            )
            for x, y in points
        ]


class Lines:
    """A layer of drawn lines, density 0-1."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._image = Image.new("L", (SIZE * _FINE, SIZE * _FINE))
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points: Iterable[Point], width: float, value: float) -> None:
        """A polyline; `width` in half film widths, `value` 0-1 overwrites what is below."""
        pixels = max(1, round(width * self._frame.exposure.zoom * SIZE * _FINE / 2))
        self._draw.line(self._frame.pixels(points), fill=int(255 * value), width=pixels)

    def polygon(self, points: Iterable[Point], value: float) -> None:
        self._draw.polygon(self._frame.pixels(points), fill=int(255 * value))

    def layer(self, blur: float = 0.0) -> Array:
        """The layer as an array, blurred by `blur` film pixels."""
        small = np.asarray(self._image.reduce(_FINE), dtype=np.float32) * np.float32(1 / 255)
        return gaussian_filter(small, blur, truncate=2.5) if blur else small


def along(curve: Callable[[float], Point], steps: int = 14) -> Points:
    return [curve(i / (steps - 1)) for i in range(steps)]


def rounded(points: Points) -> Points:
    """Corner-cut a polyline twice (Chaikin)."""
    for _ in range(2):
        cut = [
            (a[0] * u + b[0] * (1 - u), a[1] * u + b[1] * (1 - u)) for a, b in pairwise(points) for u in (0.75, 0.25)
        ]
        points = [points[0], *cut, points[-1]]
    return points
