"""What an encoding loses, in grey levels: at full size, and after the resize that a model sees."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MODEL_SIZE = 224


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """One film against itself, encoded and decoded."""

    error: float
    """Mean squared error, grey levels^2."""
    resized_error: float
    """The same after the bicubic resize of both to 224 x 224."""
    resized_difference: float
    """Mean absolute difference after that resize, grey levels."""


def loss(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> Loss:
    """Compare two films (H, W)."""
    resized = _difference(_resize(before), _resize(after))
    return Loss(
        error=float((_difference(before, after) ** 2).mean()),
        resized_error=float((resized**2).mean()),
        resized_difference=float(np.abs(resized).mean()),
    )


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 255; infinite without loss."""
    return 10 * math.log10(255**2 / mean_squared_error) if mean_squared_error else math.inf


def _resize(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).resize((MODEL_SIZE, MODEL_SIZE), Image.Resampling.BICUBIC))


def _difference(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.int32]:
    # Whole numbers: their sums are exact, so that no CPU's order of adding shows in what --encoding auto picks.
    return before.astype(np.int32) - after
