"""Scores equal scikit-learn's on every draw; intervals are over patients; thresholds are the best there are."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, matthews_corrcoef, recall_score, roc_auc_score

import train.scores
from shards.schema import NO_GROUP
from train.scorecard import score_split
from train.scores import (
    METRICS,
    auroc,
    choose_threshold,
    draws,
    interval,
    mean_known,
    patients_of,
    score_labels,
    truth_of,
)


@pytest.mark.parametrize("digits", [0, 1, 9])
@pytest.mark.parametrize("rows", [3, 40, 300])
def test_scores_are_scikit_learns_on_every_draw(rows: int, digits: int) -> None:
    """Random truth with unknown rows, ties or none, films that share a patient."""
    rng = np.random.default_rng(rows + digits)
    truth = rng.integers(2, size=(rows, 3)).astype(float)
    scores = np.round(rng.normal(size=(rows, 3)) + truth, digits)
    truth[rng.random((rows, 3)) < 0.1] = np.nan
    patients = patients_of(rng.integers(0, max(2, rows // 3), size=rows))
    thresholds = np.median(scores, axis=0)
    drawn = np.concatenate([patients.drawn_once(), *draws(patients.count, rounds=7, seed=0)], axis=1)
    found = score_labels(scores, truth, thresholds, patients.of_row, drawn)
    compared = 0
    for label, draw in np.ndindex(3, drawn.shape[1]):
        weight = drawn[patients.of_row, draw]
        taken = ~np.isnan(truth[:, label]) & (weight > 0)
        sample = truth[taken, label], scores[taken, label], weight[taken]
        if len(np.unique(sample[0])) < 2:
            assert np.isnan(found[:, label, draw]).all()
        else:
            assert found[:, label, draw] == pytest.approx(sklearns(*sample, thresholds[label]), abs=1e-12)
            compared += 1
    assert compared >= 5


def sklearns(truth: np.ndarray, scores: np.ndarray, weight: np.ndarray, threshold: float) -> list[float]:
    """METRICS, in order."""
    called = scores >= threshold
    ranked = [metric(truth, scores, sample_weight=weight) for metric in (roc_auc_score, average_precision_score)]
    at = [metric(truth, called, sample_weight=weight) for metric in (f1_score, matthews_corrcoef)]
    return [*ranked, *at, *(recall_score(truth, called, sample_weight=weight, pos_label=side) for side in (1, 0))]


def test_a_perfect_a_reversed_and_a_constant_score() -> None:
    truth = np.array([0.0, 0, 1, 1])
    assert [auroc(sign * truth, truth) for sign in (1, -1, 0)] == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("truth", [[1.0, 1], [0.0, 0], [np.nan, 1], [], [np.nan]])
def test_one_sided_labels_have_no_score(truth: list[float]) -> None:
    values = np.array(truth)
    assert auroc(np.zeros(len(values)), values) is None
    once = np.ones((len(values), 1), np.float32)
    column = np.zeros((len(values), 1)), values[:, None], np.zeros(1), np.arange(len(values))
    assert np.isnan(score_labels(*column, once)).all()
    assert np.isnan(choose_threshold(np.zeros(len(values)), values, "f1"))


def test_what_uncertain_counts_as() -> None:
    labels = np.array([1, 0, -1, np.nan, 2], np.float32)
    for policy, value in (("ignore", np.nan), ("positive", 1), ("negative", 0)):
        np.testing.assert_array_equal(truth_of(labels, policy), [1, 0, value, np.nan, np.nan])


@pytest.mark.parametrize(("by", "metric"), [("f1", f1_score), ("mcc", matthews_corrcoef)])
def test_no_threshold_is_better_than_the_chosen_one(by, metric) -> None:
    rng = np.random.default_rng(3)
    for _ in range(4):
        truth = (rng.random(40) < 0.3).astype(float)
        scores = np.round(rng.normal(size=40) + truth, 1)
        chosen = choose_threshold(scores, truth, by)
        best = max(metric(truth, scores >= level) for level in scores)
        assert metric(truth, scores >= chosen) == pytest.approx(best)
        assert chosen not in scores or chosen == scores.min()  # between two films, not on one


def test_intervals_are_over_patients_not_films() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=60).astype(np.float32)
    scores = (labels + rng.normal(0, 1.5, 60)).astype(np.float32)
    low, high = intervals(scores, labels, np.arange(60))[0]
    assert low < auroc(scores, labels) < high
    # Ten copies of each film of the same patient add nothing; of ten patients they would.
    again = np.tile(scores, 10), np.tile(labels, 10)
    copied, spread = intervals(*again, np.tile(np.arange(60), 10))[0], intervals(*again, np.arange(600))[0]
    assert np.allclose(copied, (low, high))
    assert (spread[1] - spread[0]) < 0.5 * (high - low)


def test_intervals_at_the_edges() -> None:
    labels = np.array([0, 1] * 10, dtype=np.float32)
    assert intervals(labels, labels, np.arange(20))[0] == [1, 1]
    assert interval(np.append(np.arange(201.0), np.nan)) == [5, 195]
    nobody = np.zeros(20, dtype=np.float32)
    assert intervals(labels, nobody, np.arange(20)) == [None, None]
    both = intervals(np.stack([labels, labels], 1), np.stack([labels, nobody], 1), np.arange(20))
    assert both == [[1, 1], None, [1, 1]]  # the mean is over the labels that somebody has


def intervals(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> list:
    """Of the AUROC of each label (N,) or (N, K), and of their mean."""
    scores, labels = scores.reshape(len(groups), -1), labels.reshape(len(groups), -1)
    names, none = [str(n) for n in range(labels.shape[1])], np.full(labels.shape[1], np.nan)
    found, mean = score_split(names, scores, labels, none, patients_of(groups), rounds=200, seed=0)
    return [each.intervals["auroc"] for each in (*found.values(), mean)]


def test_a_film_without_a_patient_stands_for_itself() -> None:
    mixed = patients_of(np.array([7, NO_GROUP, 7, 2, NO_GROUP]))
    assert mixed.count == 4 and mixed.of_row[0] == mixed.of_row[2] and mixed.unit == "patient, or film without one"
    assert len(set(mixed.of_row)) == 4
    assert patients_of(np.full(3, NO_GROUP)).unit == "film" and patients_of(np.array([1, 1])).unit == "patient"


def test_draws_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on how many are made at once, nor on how many are asked for."""
    whole = np.concatenate(list(draws(50, rounds=40, seed=1)), axis=1)
    assert (whole.sum(axis=0) == 50).all() and not (whole == whole[:, :1]).all()
    monkeypatch.setattr(train.scores, "_ELEMENTS", 350)
    parts = list(draws(50, rounds=30, seed=1))
    assert len(parts) == 5
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole[:, :30])
    assert not (next(draws(50, rounds=1, seed=2)) == whole[:, :1]).all()


def test_means_leave_out_what_is_not_known() -> None:
    values = np.array([[0.5, np.nan], [1.0, np.nan]])
    np.testing.assert_array_equal(mean_known(values), [0.75, np.nan])
    assert interval(np.array([np.nan, 0.5])) == [0.5, 0.5] and interval(np.array([np.nan])) is None
    assert len(METRICS) == 6
