"""Rotation, jitter and blur: torchvision's distributions, both implementations alike on real films, off by default."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from pipeline import effects
from pipeline.augment import decide
from pipeline.batch import Batch, World
from pipeline.config import CLIP_MEAN, CLIP_STD, DataConfig, LoaderConfig
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
from pipeline.loader import build_loader
from shards.errors import InputError
from shards.manifest import read_manifest
from train.commandline import from_fields, to_fields
from train.presets import PRESETS

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


def test_compiled_steps_are_pillows_and_numpys_to_the_bit(films: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    assert effects.compiled_functions() is not None
    cases = [(films[0], angle, 1.5) for angle in (-179.9, -90.0, -7.3, 1e-6, 45.0, 90.0, 180.0)]
    for _ in range(60):
        film = rng.integers(0, 256, rng.integers(3, 90, 2), dtype=np.uint8)
        film.flags.writeable = bool(rng.random() < 0.5)  # Pillow's are not
        cases.append((film, float(np.float32(rng.uniform(-180, 180))), float(np.float32(rng.uniform(0.02, 9)))))
    ours = [(effects.rotate(film, angle), effects.blur(film, sigma)) for film, angle, sigma in cases]
    monkeypatch.setattr(effects, "compiled_functions", lambda: None)
    for (turned, blurred), (film, angle, sigma) in zip(ours, cases, strict=True):
        assert np.array_equal(turned, effects.rotate(film, angle)), (film.shape, angle)
        assert np.array_equal(blurred, effects.blur(film, sigma)), (film.shape, sigma)


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
    assert abs((jittered & blurred).mean() - 0.4) < 0.015  # neither tells of the other
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


def loaded(shards_dir: Path, count: int = 3, **settings: object) -> list[Batch]:
    """The first batches of a loader, kept."""
    config = LoaderConfig(shards=shards_dir, **{"batch_size": 8, "threads": 2, "backend": "cpu", **settings})  # type: ignore[arg-type]
    with build_loader(config, World()) as loader:
        return [replace(batch, images=batch.images.clone()) for batch, _ in zip(loader, range(count), strict=False)]


def levels(batch: Batch) -> torch.Tensor:
    """Grey levels of a batch's first channel."""
    return (batch.images[:, 0] * CLIP_STD[0] + CLIP_MEAN[0]) * 255


def test_all_backends_make_the_same_views_with_effects(shards_dir: Path, source: tuple[Path, Path]) -> None:
    settings = {"views": 2, "effects": STRONG, "flip_guard": True, "scale": (0.3, 1.0), "h5": source[0]}
    expected = loaded(shards_dir, **settings)
    for batch in expected:
        assert batch.images.shape == (16, 3, 224, 224) and len(batch) == len(batch.tokens) == len(batch.labels) == 8
        assert ((levels(batch)[:8] - levels(batch)[8:]).abs().mean((1, 2)) > 1).all()
    for backend, limit in (("dali", 0.35), ("hdf5", 1.5), ("hdf5-tuned", 1.5)):
        for one, two in zip(loaded(shards_dir, backend=backend, **settings), expected, strict=True):
            assert torch.equal(one.samples, two.samples)
            assert (levels(one) - levels(two)).abs().mean((1, 2)).max() < limit, backend


def test_the_first_view_is_the_only_one_of_others(shards_dir: Path) -> None:
    """Two views cost no run its reproducibility: the first is what a run with one view sees."""
    for one, three in zip(loaded(shards_dir), loaded(shards_dir, views=3), strict=True):
        assert torch.equal(one.images, three.images[:8]) and torch.equal(one.samples, three.samples)
        assert three.images.shape[0] == 24


def test_ranks_share_views_as_they_share_samples(shards_dir: Path) -> None:
    config = LoaderConfig(shards=shards_dir, batch_size=8, threads=1, backend="cpu", views=2, effects=STRONG)
    (whole,) = loaded(shards_dir, 1, views=2, effects=STRONG)
    for rank in range(2):
        with build_loader(config, World(rank=rank, size=2)) as loader:
            batch = next(loader)
            assert torch.equal(batch.images[:4], whole.images[:8][rank::2])
            assert torch.equal(batch.images[4:], whole.images[8:][rank::2])


def test_films_that_name_a_side_stay_unflipped_in_every_view(shards_dir: Path) -> None:
    manifest = read_manifest(shards_dir)
    side, positions = np.arange(64) % 3 == 0, np.arange(64)
    config = LoaderConfig(shards=shards_dir, views=2, flip=1.0, flip_guard=True)
    fate = decide(config, manifest, positions, side)
    assert fate.effects is None and fate.flipped.tolist() == [*~side, *~side]


def test_views_are_independent(shards_dir: Path) -> None:
    config = LoaderConfig(shards=shards_dir, views=2, effects=STRONG, scale=(0.2, 1.0))
    fate = decide(config, read_manifest(shards_dir), np.arange(COUNT), np.zeros(COUNT, dtype=bool))
    assert fate.effects is not None
    both = np.concatenate([fate.boxes, fate.flipped[:, None], fate.effects], axis=1).reshape(2, COUNT, 9)
    for one, two in zip(both[0].T, both[1].T, strict=True):
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.03 and abs(one.mean() - two.mean()) < 0.05 * one.std()


def test_evaluation_has_one_view_and_no_effects(shards_dir: Path) -> None:
    for one, two in zip(
        loaded(shards_dir, mode="eval"), loaded(shards_dir, mode="eval", views=2, effects=STRONG), strict=True
    ):
        assert torch.equal(one.images, two.images)


def test_effects_are_off_in_every_preset_and_part_of_a_run() -> None:
    for make in PRESETS.values():
        assert not make().data.effects
    config = from_fields(DataConfig, to_fields(DataConfig(effects=STRONG)))
    assert config.effects == STRONG
