"""Crops and flips: torchvision's distribution, and a pure function of seed and position."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from pipeline.augment import RATIO, crop_boxes, flips, guard_flips

COUNT = 20_000


def theirs(height: int, width: int, scale: tuple[float, float]) -> np.ndarray:
    """(COUNT, 4) boxes by torchvision itself."""
    torch.manual_seed(0)
    image = torch.empty(1, 1, 1).expand(1, height, width)
    return np.array([RandomResizedCrop.get_params(image, list(scale), list(RATIO)) for _ in range(COUNT)])


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(320, 320, (0.9, 1.0)), (320, 320, (0.2, 1.0)), (300, 420, (0.9, 1.0)), (200, 90, (0.5, 1.0))],
)
def test_boxes_are_distributed_as_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    ours = crop_boxes(3, np.arange(COUNT), height=height, width=width, scale=scale)
    expected = theirs(height, width, scale)
    for column in range(4):
        assert largest_gap(ours[:, column], expected[:, column]) < 0.0195, column  # 0.1 % of equal samples exceed it
    whole = [(boxes[:, 2:] == (height, width)).all(axis=1).mean() for boxes in (ours, expected)]
    assert abs(whole[0] - whole[1]) < 0.015
    # How height and width go together, too: the correlation of the two.
    ours_r, theirs_r = (np.corrcoef(boxes[:, 2], boxes[:, 3])[0, 1] for boxes in (ours, expected))
    assert abs(ours_r - theirs_r) < 0.04


def largest_gap(one: np.ndarray, two: np.ndarray) -> float:
    """The Kolmogorov-Smirnov statistic of two samples."""
    values = np.union1d(one, two)
    shares = [np.searchsorted(np.sort(each), values, side="right") / len(each) for each in (one, two)]
    return float(np.abs(shares[0] - shares[1]).max())


@given(
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=30),
    st.integers(1, 500),
    st.integers(1, 500),
    st.floats(0.01, 1.0),
)
def test_boxes_lie_inside_and_depend_on_seed_and_position_alone(
    seed: int, positions: list[int], height: int, width: int, least: float
) -> None:
    size = {"height": height, "width": width, "scale": (least, 1.0)}
    boxes = crop_boxes(seed, np.array(positions), **size)
    y, x, h, w = boxes.T
    assert (y >= 0).all() and (x >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (y + h <= height).all() and (x + w <= width).all()
    for index, position in enumerate(positions):
        assert (crop_boxes(seed, np.array([position]), **size)[0] == boxes[index]).all()


def test_a_scale_of_one_keeps_nearly_everything() -> None:
    boxes = crop_boxes(0, np.arange(2000), height=320, width=320, scale=(1.0, 1.0))
    assert boxes[:, 2:].min() >= 318


def test_half_are_flipped_whatever_the_crop() -> None:
    positions = np.arange(COUNT)
    flipped = flips(5, positions, probability=0.5)
    boxes = crop_boxes(5, positions, height=320, width=320, scale=(0.9, 1.0))
    assert abs(flipped.mean() - 0.5) < 0.015
    assert abs(boxes[flipped, 2].mean() - boxes[~flipped, 2].mean()) < 0.5
    assert not flips(5, positions, probability=0.0).any() and flips(5, positions, probability=1.0).all()


def test_the_guard_keeps_named_sides_unflipped() -> None:
    flipped, side = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert guard_flips(flipped, side).tolist() == [False, True, False, False]
