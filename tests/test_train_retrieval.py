"""Retrieval: the rank of the best right one, equal reports taken as one, against a plain double loop."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from train.retrieval import chance, rank_right_ones, retrieve
from train.scores import patients_of


def made_up(count: int, distinct: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Unit vectors of films and of their reports, some of which are equal, and the reports' digests."""
    generator = torch.Generator().manual_seed(count)
    report = np.random.default_rng(count).integers(distinct, size=count).astype(np.uint64) << np.uint64(58)
    bank = F.normalize(torch.randn(distinct, 6, generator=generator), dim=1)
    texts = bank[torch.from_numpy((report >> np.uint64(58)).astype(np.int64))]
    images = F.normalize(texts + torch.randn(count, 6, generator=generator), dim=1)
    return images, texts, report


def by_hand(similarity: np.ndarray, report: np.ndarray) -> list[int]:
    """Of each row, 1 + how many columns with another report are at least as similar as the best with the same."""
    ranks = []
    for row, own in zip(similarity, report, strict=True):
        right = report == own
        ranks.append(1 + int((row[~right] >= row[right].max()).sum()))
    return ranks


@pytest.mark.parametrize("distinct", [1, 8, 40])
@pytest.mark.parametrize("elements", [1, 100, 1 << 20])
def test_ranks_are_those_of_the_whole_matrix(distinct: int, elements: int) -> None:
    """Whatever the size of the chunks."""
    images, texts, report = made_up(60, distinct)
    similarity = (images @ texts.T).numpy()
    _, first, of_row = np.unique(report, return_index=True, return_inverse=True)
    to_text, to_image = rank_right_ones(images, texts[first], torch.from_numpy(of_row), elements=elements)
    listed = report[first]
    ranks = [
        1 + (row[listed != own] >= row[listed == own]).sum()
        for row, own in zip(similarity[:, first], report, strict=True)
    ]
    assert to_text.tolist() == ranks
    assert to_image.tolist() == by_hand(similarity.T, report)


def test_recall_counts_an_equal_report_as_right() -> None:
    """Films 0 and 1 have the same report; each finds it at once, whichever film it belongs to."""
    vectors = torch.eye(3)
    same = torch.stack([vectors[0], vectors[0], vectors[1]])
    digests = np.array([2**63, 2**63, 1], np.uint64)
    found = retrieve(same, same, digests, patients_of(np.arange(3)), rounds=50, seed=0)
    assert (found.gallery, found.distinct_reports) == (3, 2)
    for way in (found.image_to_text, found.text_to_image):
        assert way.recall["1"].recall == 1 and way.median_rank == 1 and way.recall["1"].interval == [1, 1]
    assert found.image_to_text.recall["1"].chance == 1 / 2  # two reports to choose from
    assert found.text_to_image.recall["1"].chance == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)


def test_a_model_that_has_collapsed_finds_nothing() -> None:
    point = F.normalize(torch.ones(50, 4), dim=1)
    found = retrieve(point, point, np.arange(50, dtype=np.uint64), patients_of(np.arange(50)), rounds=0, seed=0)
    for way in (found.image_to_text, found.text_to_image):
        assert way.median_rank == 50 and [recall.recall for recall in way.recall.values()] == [0, 0, 0]
        assert way.recall["10"].interval is None and way.recall["10"].chance == pytest.approx(10 / 50)


def test_chance_is_that_of_drawing_without_putting_back() -> None:
    assert chance(np.array([1, 2, 9]), 10, 5) == pytest.approx([0.5, 1 - (8 / 10 * 7 / 9 * 6 / 8 * 5 / 7 * 4 / 6), 1.0])
    assert chance(np.array([1]), 3, 10).tolist() == [1.0]  # the gallery is smaller than k


def test_intervals_of_recall_are_over_patients() -> None:
    images, texts, report = made_up(60, 60)
    one = retrieve(images, texts, report, patients_of(np.arange(60)), rounds=300, seed=0).image_to_text.recall["10"]
    few = retrieve(images, texts, report, patients_of(np.arange(60) // 20), rounds=300, seed=0)
    low, high = one.interval
    assert low < one.recall < high and few.image_to_text.recall["10"].interval != one.interval
