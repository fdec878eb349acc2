"""Steps that change how a film looks, as plain data: drawn by the position, done by one implementation a device family.

    decoded film (H, W) uint8 -> rotation -> brightness and contrast -> Gaussian blur -> uint8 again; then crop, resize

Each film has four numbers: an angle, a brightness, a contrast, a sigma; `draw` makes them, `apply` follows them on the
CPU (as Pillow and numpy do, compiled), `in_graph` in a DALI graph on either device. On real films the two differ by one
grey level at most after one step and two after all, 0.02 and 0.05 on average (tests, DALI on the CPU). All are off
unless asked for. The whole film is treated, before the crop, so that what a rotation brings in from beyond the border
is seen least, and both resizes stay as they are.

The distributions are those of torchvision's `RandomRotation`, `ColorJitter` and `GaussianBlur`, but for one thing:
contrast turns about the middle grey level of 128, not about the film's own mean.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.counter import hash64, uniform
from shards.errors import InputError

Ints = NDArray[np.int64]
Values = NDArray[np.float32]

ANGLE, BRIGHTNESS, CONTRAST, SIGMA = range(4)
"""Columns of the numbers of a film."""
MIDDLE = 128.0
"""Grey level that contrast leaves as it is."""
LEAST_SIGMA = 0.01
"""Of a blur that changes no pixel: DALI takes none of zero."""

# Words of `pipeline.augment`'s range, 16 and up.
_ANGLE_WORD, _BRIGHTNESS_WORD, _CONTRAST_WORD, _JITTER_WORD, _SIGMA_WORD, _BLUR_WORD = range(32, 38)


@dataclass(frozen=True, kw_only=True, slots=True)
class EffectsConfig:
    """How strongly the look of training images is changed; nothing is unless asked for."""

    rotation: float = 0.0
    """Largest angle either way, degrees; the angle is uniform between. What comes in from outside is black."""
    brightness: float = 0.0
    """Grey levels are multiplied by a factor uniform in 1 - this .. 1 + this."""
    contrast: float = 0.0
    """Distances from grey level 128 are multiplied by a factor uniform in 1 - this .. 1 + this."""
    jitter_chance: float = 1.0
    """Probability that brightness and contrast of an image change."""
    blur: tuple[float, float] = (0.0, 0.0)
    """Range of the Gaussian's sigma, pixels of the stored film."""
    blur_chance: float = 0.5
    """Probability that an image is blurred."""

    def __post_init__(self) -> None:
        if not 0 <= self.rotation <= 180:
            raise InputError(f"effects rotation {self.rotation} is no angle from 0 to 180 degrees")
        for name in ("brightness", "contrast", "jitter_chance", "blur_chance"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"effects {name} {getattr(self, name)} has to lie in [0, 1]")
        if not 0 <= self.blur[0] <= self.blur[1] <= 20:
            raise InputError(f"effects blur {self.blur} is not a range of sigma within [0, 20] pixels")

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        jitter = (self.brightness or self.contrast) and self.jitter_chance
        return bool(self.rotation or jitter or (self.blur[1] and self.blur_chance))


def draw(config: EffectsConfig, seed: int, positions: Ints) -> Values:
    """The numbers of the images at positions (n,): float32 (n, 4), degrees, factor, factor, pixels."""

    def between(word: int, low: float, high: float) -> NDArray[np.float64]:
        return low + (high - low) * uniform(hash64(seed, word, positions))

    def happens(word: int, chance: float) -> NDArray[np.bool_]:
        return uniform(hash64(seed, word, positions)) < chance

    jitter = happens(_JITTER_WORD, config.jitter_chance)
    blur = happens(_BLUR_WORD, config.blur_chance)
    numbers = np.empty((len(positions), 4), dtype=np.float32)
    numbers[:, ANGLE] = between(_ANGLE_WORD, -config.rotation, config.rotation)
    numbers[:, BRIGHTNESS] = np.where(
        jitter, between(_BRIGHTNESS_WORD, 1 - config.brightness, 1 + config.brightness), 1
    )
    numbers[:, CONTRAST] = np.where(jitter, between(_CONTRAST_WORD, 1 - config.contrast, 1 + config.contrast), 1)
    numbers[:, SIGMA] = np.where(blur, between(_SIGMA_WORD, *config.blur), 0)
    return numbers


def apply(pixels: NDArray[np.uint8], numbers: Values) -> NDArray[np.uint8]:
    """A film (H, W) changed as its four numbers say; a new array, or the film itself where they say nothing."""
    angle, brightness, contrast, sigma = (float(number) for number in numbers)
    if angle:
        pixels = rotate(pixels, angle)
    if (brightness, contrast) != (1, 1):
        pixels = np.take(_levels(brightness, contrast), pixels)
    return blur(pixels, sigma) if sigma > LEAST_SIGMA else pixels


def rotate(pixels: NDArray[np.uint8], degrees: float) -> NDArray[np.uint8]:
    """A film (H, W) rotated counter-clockwise about its centre, bilinear, of the same size, black from outside."""
    # As float32 and with a black frame, because Pillow cuts bytes off instead of rounding and blends with no border.
    framed = np.pad(pixels, 1).astype(np.float32)
    if (functions := compiled_functions()) and degrees % 90:
        out = np.empty(pixels.shape, dtype=np.uint8)
        functions[0](framed, _matrix(degrees, *framed.shape), out)
        return out
    from PIL import Image

    turned = Image.fromarray(framed).rotate(degrees, Image.Resampling.BILINEAR)
    return np.rint(np.asarray(turned)[1:-1, 1:-1]).clip(0, 255).astype(np.uint8)


def blur(pixels: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    """A film (H, W) after a Gaussian of 3 sigma either way, mirrored at the borders about the outermost pixel."""
    radius = math.ceil(3 * sigma)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    height, width = pixels.shape
    if functions := compiled_functions():
        smooth = np.empty(pixels.shape, dtype=np.uint8)
        rows, columns = (np.pad(np.arange(length), radius, mode="reflect") for length in pixels.shape)
        functions[1](pixels, rows, columns, taps, smooth)
        return smooth
    padded = np.pad(pixels.astype(np.float32), radius, mode="reflect")
    rows, out = np.zeros((height + 2 * radius, width), np.float32), np.zeros((height, width), np.float32)
    product = np.empty_like(rows)
    for index, tap in enumerate(taps):
        rows += np.multiply(padded[:, index : index + width], tap, out=product)
    for index, tap in enumerate(taps):
        out += np.multiply(rows[index : index + height], tap, out=product[:height])
    return np.rint(out).astype(np.uint8)


def in_graph(fn: Any, types: Any, pixels: Any, numbers: Any) -> Any:
    """The same steps on films (H, W, 1) of a DALI graph, `numbers` being (n, 4) float32 there."""
    angle, brightness, contrast, sigma = (numbers[column] for column in range(4))
    turned = fn.rotate(
        pixels, angle=angle, keep_size=True, fill_value=0, interp_type=types.INTERP_LINEAR, dtype=types.UINT8
    )
    jittered = fn.brightness_contrast(turned, brightness=brightness, contrast=contrast, contrast_center=MIDDLE)
    return fn.gaussian_blur(jittered, sigma=sigma)


def for_graph(numbers: Values) -> Values:
    """Numbers as `in_graph` takes them."""
    out = numbers.copy()
    out[:, SIGMA] = np.maximum(out[:, SIGMA], LEAST_SIGMA)
    return out


def _levels(brightness: float, contrast: float) -> NDArray[np.uint8]:
    """What becomes of each grey level: (256,)."""
    levels = brightness * (MIDDLE + contrast * (np.arange(256) - MIDDLE))
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


# What follows is compiled where numba works: what Pillow and numpy do above, to the bit, in a seventh of the time, and
# without the interpreter's lock.


@cache
def compiled_functions() -> tuple[Callable[..., None], Callable[..., None]] | None:
    """`_turn` and `_smooth`, compiled; None where that does not work."""
    try:
        from numba import types

        from pipeline.compiled import compiled

        films, out = types.float32[:, ::1], types.uint8[:, ::1]
        turn = compiled(_turn, types.void(films, types.float64[::1], out))
        places = types.int64[::1]
        pixels = types.Array(types.uint8, 2, "A", readonly=True)  # Pillow's are read-only
        return turn, compiled(_smooth, types.void(pixels, places, places, types.float32[::1], out))
    except Exception:  # `kernels` says so once
        return None


def _matrix(degrees: float, height: int, width: int) -> NDArray[np.float64]:
    """(6,) where a pixel of the rotated film comes from: Pillow's `Image.rotate`."""
    angle = -math.radians(degrees % 360.0)
    a, b, d, e = (round(each, 15) for each in (math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)))
    x, y = width / 2, height / 2
    return np.array([a, b, a * -x + b * -y + 0.0 + x, d, e, d * -x + e * -y + 0.0 + y])


def _turn(framed, matrix, out):
    """Pillow's bilinear affine transform of float32 (libImaging/Geometry.c), of what lies within the frame, rounded."""
    height, width = framed.shape
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            x = matrix[0] * (column + 1.5) + matrix[1] * (row + 1.5) + matrix[2]
            y = matrix[3] * (column + 1.5) + matrix[4] * (row + 1.5) + matrix[5]
            if x < 0 or x >= width or y < 0 or y >= height:
                out[row, column] = 0
                continue
            x, y = x - 0.5, y - 0.5
            left, top = math.floor(x), math.floor(y)
            dx, dy = x - left, y - top
            x0, x1 = max(left, 0), min(left + 1, width - 1)
            y0 = max(top, 0)
            one = framed[y0, x0] + (float(framed[y0, x1]) - float(framed[y0, x0])) * dx
            if top + 1 < height:
                two = framed[top + 1, x0] + (float(framed[top + 1, x1]) - float(framed[top + 1, x0])) * dx
            else:
                two = one
            out[row, column] = np.uint8(np.rint(np.float32(one + (two - one) * dy)))


def _smooth(pixels, from_rows, from_columns, taps, out):
    """`blur` of a film padded by these rows and columns of it: rows, then columns, tap by tap in float32."""
    height, width = out.shape
    rows = np.zeros((len(from_rows), width), dtype=np.float32)
    line = np.empty(len(from_columns), dtype=np.float32)
    for row in range(len(from_rows)):
        for column in range(len(from_columns)):
            line[column] = pixels[from_rows[row], from_columns[column]]
        for index in range(len(taps)):
            for column in range(width):
                rows[row, column] += line[index + column] * taps[index]
    total = np.empty(width, dtype=np.float32)
    for row in range(height):
        total[:] = 0
        for index in range(len(taps)):
            for column in range(width):
                total[column] += rows[row + index, column] * taps[index]
        for column in range(width):
            out[row, column] = np.uint8(np.rint(total[column]))
