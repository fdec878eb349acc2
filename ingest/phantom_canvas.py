"""How the phantom's films are taken and drawn: random numbers and noise from counters, exposure, smooth masks, lines.

Only sums, products and square roots of float32 are used on pixels (no exp, no power but the square), so that a film is
the same on every CPU, whatever vector units NumPy finds there. Arrays are (320, 320) float32 unless said otherwise, and
Python's numbers become float32 beside them; lengths are half film widths in the patient's frame (phantom_case).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from shards.counter import hash64, uniform

TEXTURE = 6
"""Keeps the random numbers of a film's texture apart from those of phantom_case."""
SIZE = 320
_FINE = 2  # lines are drawn at twice the resolution and averaged

Item = TypeVar("Item")
Array = NDArray[np.floating]
"""float32; NumPy's stubs take the quotient by one of Python's numbers for float64."""
Point = tuple[float, float]
Points = list[Point]


class Draw:
    """Random numbers in sequence, a pure function of the key: draws for one purpose never shift those for another."""

    _COUNT = 192

    def __init__(self, seed: int, *key: int) -> None:
        self._values = uniform(hash64(seed, *key, np.arange(self._COUNT))).tolist()
        self._next = 0

    def unit(self) -> float:
        """The next number in [0, 1)."""
        self._next += 1
        return self._values[self._next - 1]

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def pick(self, items: Sequence[Item]) -> Item:
        return items[int(self.unit() * len(items))]

    def bell(self, spread: float) -> float:
        """A number around 0 with standard deviation `spread`, within three of them (a sum of three uniforms)."""
        return spread * 2.0 * (self.unit() + self.unit() + self.unit() - 1.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exposure:
    """How one film was taken."""

    view: str
    """"PA" or "AP" (portable; the heart is magnified, the breath shallow)."""
    roll: float
    """Rotation in the film plane, radians."""
    turn: float
    """Rotation about the body axis, signed: the mediastinum shifts against the spine."""
    shift: tuple[float, float]
    zoom: float
    breath: float
    """Depth of inspiration, 1 full, 0.75 shallow."""
    level: float
    """Density that comes out mid-grey."""
    gain: float
    """Contrast."""
    noise: float
    """Standard deviation of the noise in grey levels."""
    blur: float
    """Standard deviation of the blur in pixels."""
    bars: tuple[float, float]
    """Share of the film's width and height that is black padding (films that were not square)."""
    collimation: float
    """Share of the film at the border outside the collimated beam."""
    marker: bool
    """Whether an L marker lies at the patient's left shoulder."""


def draw_exposure(draw: Draw) -> Exposure:
    """How a film was taken, at random."""
    portable = draw.chance(0.45)
    tall = draw.unit()
    return Exposure(
        view="AP" if portable else "PA",
        roll=draw.bell(0.08 if portable else 0.04),
        turn=draw.bell(0.045 if portable else 0.02),
        shift=(draw.bell(0.06), draw.bell(0.06)),
        zoom=draw.between(0.98, 1.36),
        breath=draw.between(0.74, 0.95) if portable else draw.between(0.86, 1.06),
        level=draw.between(0.66, 0.98),
        gain=draw.between(1.7, 3.2),
        noise=draw.between(2.0, 6.0),
        blur=draw.between(0.4, 1.2),
        bars=(0.0, 0.0) if tall < 0.6 else ((0.12 * draw.unit(), 0.0) if tall < 0.85 else (0.0, 0.10 * draw.unit())),
        collimation=draw.between(0.01, 0.06) if draw.chance(0.3) else 0.0,
        marker=draw.chance(0.6),
    )


def sign(side: str) -> int:
    """+1 where the patient's left is, on the right of the image."""
    return 1 if side == "left" else -1


def step(z: Array) -> Array:
    """Smooth step from 0 at z = -1 to 1 at z = 1."""
    t = np.clip(z * 0.5 + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def bump(r2: Array) -> Array:
    """Bell over the squared radius: 1 at 0, 0 from 1 on."""
    t = np.clip(1 - r2, 0, None)
    return t * t


class Field:
    """Smooth noise, made from counters, so that each use has its own and no order matters."""

    def __init__(self, seed: int, index: int) -> None:
        self._key = (seed, TEXTURE, index)

    def smooth(self, purpose: int, cells: int) -> Array:
        """Noise in about [-1, 1] that varies over 1/`cells` of the film."""
        grid = _signed(hash64(*self._key, purpose, np.arange(cells * cells))).reshape(cells, cells)
        return np.asarray(Image.fromarray(grid).resize((SIZE, SIZE), Image.Resampling.BICUBIC))

    def grain(self, purpose: int) -> Array:
        """Independent pixels, near Gaussian (a sum of four uniforms), standard deviation 1."""
        words = hash64(*self._key, purpose, np.arange(SIZE * SIZE)).view(np.uint16).reshape(SIZE, SIZE, 4)
        total = words[..., 0].astype(np.float32) + words[..., 1] + words[..., 2] + words[..., 3]
        return (total - 131070.0) * (1 / 37837.2)


def _signed(hashes: NDArray[np.uint64]) -> Array:
    return (hashes >> np.uint64(40)).astype(np.float32) * 2.0**-23 - 1


@dataclass(frozen=True, slots=True)
class Frame:
    """The map between the patient's frame and the film."""

    exposure: Exposure

    def grids(self) -> tuple[Array, Array]:
        """The patient's x and y at each pixel."""
        axis = (np.arange(SIZE, dtype=np.float32) + 0.5) * (2 / SIZE) - 1
        e, cos, sin = self.exposure, math.cos(self.exposure.roll), math.sin(self.exposure.roll)
        x, y = (axis[None, :] - e.shift[0]) / e.zoom, (axis[:, None] - e.shift[1]) / e.zoom
        return cos * x + sin * y, cos * y - sin * x

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
        small = np.asarray(self._image.reduce(_FINE), dtype=np.float32) * (1 / 255)
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
