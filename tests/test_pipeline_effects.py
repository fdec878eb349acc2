"""Rotation, jitter and blur: torchvision's distributions, both implementations alike on real films, off by default."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from pipeline.effects import (
    ANGLE,
    BRIGHTNESS,
    CONTRAST,
    LEAST_SIGMA,
    SIGMA,
    EffectsConfig,
    apply,
    blur,
    draw,
    for_graph,
    in_graph,
    rotate,
)
from shards.errors import InputError

STRONG = EffectsConfig(rotation=15.0, brightness=0.4, contrast=0.3, jitter_chance=0.8, blur=(0.1, 2.0), blur_chance=0.5)
COUNT = 20_000


@pytest.fixture(scope="module")
def films(real_data: Path) -> np.ndarray:
    """(24, 320, 320) real films."""
    paths = sorted((real_data / "nih" / "images").glob("*.png"))[:24]
    return np.stack([np.array(Image.open(path).convert("L").resize((320, 320))) for path in paths])


def by_dali(films: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(n, H, W) by the graph on the CPU."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=len(films), num_threads=1, device_id=None)
    def graph() -> object:
        pixels, given = fn.external_source(
            source=lambda: (list(films[..., None]), for_graph(numbers)),
            num_outputs=2, dtype=[types.UINT8, types.FLOAT], ndim=[3, 1], layout=["HWC", ""],
        )  # fmt: skip
        return in_graph(fn, types, pixels, given)

    built = graph()
    built.build()
    return np.stack([np.asarray(film)[..., 0] for film in built.run()[0]])


def only(column: int, values: np.ndarray) -> np.ndarray:
    """Numbers that change nothing but one column."""
    numbers = np.tile(np.array([0, 1, 1, 0], np.float32), (len(values), 1))
    numbers[:, column] = values
    return numbers


@pytest.mark.parametrize(
    ("column", "low", "high"), [(ANGLE, -15, 15), (BRIGHTNESS, 0.6, 1.4), (CONTRAST, 0.7, 1.3), (SIGMA, 0.0, 2.0)]
)
def test_dali_and_the_cpu_agree_on_real_films(films: np.ndarray, column: int, low: float, high: float) -> None:
    numbers = only(column, np.linspace(low, high, len(films)))
    ours, theirs = (np.stack([apply(*each) for each in zip(films, numbers, strict=True)]), by_dali(films, numbers))
    assert (ours != films).mean() > 0.3
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.mean() <= 0.02 and difference.max() <= 1


def test_all_steps_together_agree_on_real_films(films: np.ndarray) -> None:
    numbers = draw(STRONG, 4, np.arange(len(films)))
    ours, theirs = (np.stack([apply(*each) for each in zip(films, numbers, strict=True)]), by_dali(films, numbers))
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.mean() <= 0.05 and difference.max() <= 2


def test_rotation_and_blur_are_torchvisions_on_real_films(films: np.ndarray) -> None:
    for film, angle, sigma in zip(films[:6], (-15, -3, 0.5, 2, 7, 90), (0.3, 0.5, 0.9, 1.3, 2, 3), strict=True):
        tensor = torch.from_numpy(film)[None]
        turned = transforms.rotate(tensor.float(), angle, transforms.InterpolationMode.BILINEAR)[0].numpy()
        difference = np.abs(rotate(film, angle) - turned)[2:-2, 2:-2]
        assert difference.mean() < 0.3 and (difference < 1.01).mean() > 0.99
        size = 2 * int(np.ceil(3 * sigma)) + 1
        blurred = transforms.gaussian_blur(tensor, [size, size], [sigma, sigma])[0].numpy()
        assert np.abs(blur(film, sigma).astype(int) - blurred).max() <= 1


def test_jitter_is_what_it_says(films: np.ndarray) -> None:
    film = films[0]
    changed = apply(film, np.array([0, 1.2, 0.5, 0], np.float32))
    assert np.abs(changed - np.clip(1.2 * (128 + 0.5 * (film - 128.0)), 0, 255)).max() <= 0.5001
    assert apply(film, np.array([0, 1, 1, 0], np.float32)) is film


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_numbers_depend_on_seed_and_position_alone(seed: int, positions: list[int]) -> None:
    numbers = draw(STRONG, seed, np.array(positions))
    assert numbers.shape == (len(positions), 4) and numbers.dtype == np.float32
    for index, position in enumerate(positions):
        assert (draw(STRONG, seed, np.array([position]))[0] == numbers[index]).all()
    assert (np.abs(numbers[:, ANGLE]) <= 15).all() and (numbers[:, SIGMA] <= 2).all()


def test_numbers_are_distributed_as_asked() -> None:
    numbers = draw(STRONG, 3, np.arange(COUNT))
    jittered, blurred = numbers[:, BRIGHTNESS] != 1, numbers[:, SIGMA] > 0
    assert abs(jittered.mean() - 0.8) < 0.015 and abs(blurred.mean() - 0.5) < 0.015
    uniforms = [
        (numbers[:, ANGLE] + 15) / 30,
        (numbers[jittered, BRIGHTNESS] - 0.6) / 0.8,
        (numbers[jittered, CONTRAST] - 0.7) / 0.6,
        (numbers[blurred, SIGMA] - 0.1) / 1.9,
    ]
    for values in uniforms:  # Kolmogorov-Smirnov; 0.1 % of uniform samples exceed it
        values = np.sort(values)
        assert np.abs(values - np.arange(len(values)) / len(values)).max() < 1.95 / np.sqrt(len(values))
    columns = np.corrcoef(numbers[jittered & blurred].T)
    assert np.abs(columns - np.eye(4)).max() < 0.05


def test_nothing_happens_unless_asked() -> None:
    numbers = draw(EffectsConfig(), 3, np.arange(100))
    assert (numbers == np.array([0, 1, 1, 0], np.float32)).all() and not EffectsConfig()
    assert (for_graph(numbers)[:, SIGMA] == np.float32(LEAST_SIGMA)).all()
    assert EffectsConfig(rotation=1.0) and EffectsConfig(blur=(0.0, 1.0)) and EffectsConfig(contrast=0.1)
    assert not EffectsConfig(contrast=0.1, jitter_chance=0.0)


@pytest.mark.parametrize(
    "settings",
    [{"rotation": -1.0}, {"rotation": float("nan")}, {"brightness": 1.5}, {"blur": (2.0, 1.0)}, {"blur": (0.0, 99.0)}],
)
def test_settings_that_cannot_be_are_refused(settings: dict) -> None:
    with pytest.raises(InputError, match="effects"):
        EffectsConfig(**settings)
