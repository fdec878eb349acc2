"""AUROC, average precision, F1, MCC: scikit-learn's values, for many bootstrap draws at once; and those draws.

Everything takes `drawn` (P, R): how often each of P patients is in each of R draws; ones (P, 1) is the data as it is.
Rows are sorted and ties grouped once for all draws. A metric is NaN in a draw that lacks positives or negatives.

AUROC is the share of pairs of a positive and a negative in which the positive scores higher, ties counting half
(Mann-Whitney). Average precision is the sum over distinct scores of precision times the gain in recall, without
interpolation. F1, MCC, sensitivity and specificity are of `score >= threshold`.

Intervals are over patients: films of one patient are drawn together, for they are not independent. A draw takes as many
patients as there are, with replacement, with all their films; the 2.5th and 97.5th percentile of a metric over the
draws are its 95 % interval. All labels see the same draws, so that their mean has an interval too. A draw in which a
label has no positive or no negative says nothing of the label and is left out of its interval and mean.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shards.schema import NO_GROUP

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Uncertain = Literal["ignore", "positive", "negative"]
Criterion = Literal["mcc", "f1"]

RANKED = ("auroc", "average_precision")
THRESHOLDED = ("f1", "mcc", "sensitivity", "specificity")
METRICS = (*RANKED, *THRESHOLDED)


def truth_of(labels: NDArray[np.float32], uncertain: Uncertain = "ignore") -> Floats:
    """Labels as they are scored, same shape: 1, 0, or NaN for left out. `uncertain` says what -1 becomes."""
    truth = np.where(np.isin(labels, (0, 1)), labels, np.nan).astype(np.float64)
    truth[labels == -1] = {"ignore": np.nan, "positive": 1.0, "negative": 0.0}[uncertain]
    return truth


def auroc(scores: NDArray[np.floating], truth: NDArray[np.floating]) -> float | None:
    """AUROC of scores (N,) over the rows whose truth is 1 or 0; None where a side has no row."""
    found = float(_ranked(scores, truth, np.arange(len(truth)), np.ones((len(truth), 1), np.float32))[0, 0])
    return None if np.isnan(found) else found


def aurocs(scores: NDArray[np.floating], labels: NDArray[np.float32], names: Sequence[str]) -> dict[str, float | None]:
    """AUROC by name of scores and labels (N, K), over the rows where a label is known for certain."""
    truth = truth_of(labels)
    return {name: auroc(scores[:, n], truth[:, n]) for n, name in enumerate(names)}


def score_labels(
    scores: Floats, truth: Floats, thresholds: Floats, patient: Ints, drawn: NDArray[np.float32]
) -> Floats:
    """METRICS of K labels in R draws, (len(METRICS), K, R). scores, truth (N, K); thresholds (K,), NaN for none."""
    found = []
    for number, threshold in enumerate(thresholds):
        column = scores[:, number], truth[:, number]
        ranked = _ranked(*column, patient, drawn)
        found.append(np.concatenate([ranked, _at_threshold(*column, threshold, patient, drawn)]))
    return np.stack(found, axis=1) if found else np.empty((len(METRICS), 0, drawn.shape[1]))


def choose_threshold(scores: Floats, truth: Floats, by: Criterion) -> float:
    """The threshold that maximises F1 or MCC on scores (N,): midway to the next lower score, the highest of several.

    NaN where positives or negatives are missing. Midway, so that it does not hang on one film's last digits.
    """
    known = (truth == 0) | (truth == 1)
    levels, level = np.unique(-scores[known], return_inverse=True)
    positive = truth[known] == 1
    if not 0 < positive.sum() < len(positive):
        return float("nan")
    tp = np.cumsum(np.bincount(level, weights=positive)).astype(np.float64)
    fp = np.cumsum(np.bincount(level, weights=~positive)).astype(np.float64)
    f1, mcc = f1_and_mcc(tp, fp, tp[-1] - tp, fp[-1] - fp)
    best = int(np.argmax(f1 if by == "f1" else mcc))
    return float(-levels[best : best + 2].mean())


def f1_and_mcc(tp: Floats, fp: Floats, fn: Floats, tn: Floats) -> tuple[Floats, Floats]:
    """F1 and Matthews' correlation of counts of any shape; 0 where a denominator is, as scikit-learn has it."""
    f1 = _ratio(2 * tp, 2 * tp + fp + fn)
    # Four roots, not the root of a product: 100,000 films to the fourth power leave float64's exact range.
    spread = np.sqrt(tp + fp) * np.sqrt(tp + fn) * np.sqrt(tn + fp) * np.sqrt(tn + fn)
    return f1, _ratio(tp * tn - fp * fn, spread)


def sum_by(patient: Ints, values: NDArray[np.generic], count: int) -> Floats:
    """Sums (count, M) of values (N, M) over the rows of each patient."""
    columns = [np.bincount(patient, weights=column.astype(np.float64), minlength=count) for column in values.T]
    return np.stack(columns, axis=1)


def _ranked(
    scores: NDArray[np.floating], truth: NDArray[np.floating], patient: Ints, drawn: NDArray[np.float32]
) -> Floats:
    """AUROC and average precision, (2, R). Sums of counts are exact in float32 up to 16 million rows."""
    rows = np.flatnonzero((truth == 0) | (truth == 1))
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    positive = truth[rows] == 1
    if not 0 < positive.sum() < len(positive):
        return np.full((2, drawn.shape[1]), np.nan)
    first, starts, ends = _tied_groups(scores[rows], positive)
    weight = drawn[patient[rows]]  # (n, R)
    gain = np.add.reduceat(weight[positive], first, axis=0).astype(np.float64)  # positives of each group (G, R)
    until, before = _sums_at(weight, ends), _sums_at(weight, starts)  # all rows, (G, R)
    tp = np.cumsum(gain, axis=0)
    total, positives = weight.sum(axis=0, dtype=np.float64), tp[-1]
    negatives = total - positives
    fp = (until - tp + before - (tp - gain)) / 2  # in the middle of the group
    auroc = _share((gain * (negatives - fp)).sum(axis=0), positives * negatives)
    precision = _share((gain * _ratio(tp, until)).sum(axis=0), positives)
    precision[negatives == 0] = np.nan
    return np.stack([auroc, precision])


def _tied_groups(ordered: NDArray[np.floating], positive: Bools) -> tuple[Ints, Ints, Ints]:
    """Of the groups of equal scores with a positive: its number among the positives, first row, row after the last.

    The other groups change neither metric but by their sums, so that rare labels cost little.
    """
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    group = np.searchsorted(begins, np.flatnonzero(positive), side="right") - 1
    groups, first = np.unique(group, return_index=True)
    return first, begins[groups], np.append(begins, len(ordered))[groups + 1]


def _sums_at(weight: NDArray[np.float32], places: Ints) -> Floats:
    """Sums (G, R) of the rows of weight (n, R) before each of G ascending places."""
    cuts = np.unique(np.append(places, 0))
    inner = cuts[cuts < len(weight)]
    sums = np.cumsum(np.add.reduceat(weight, inner, axis=0), axis=0, dtype=np.float64)
    sums = np.concatenate([np.zeros((1, weight.shape[1])), sums])
    # Entry i + 1 is the sum up to the next cut, or to the end.
    return sums[np.searchsorted(cuts, places)]


def _at_threshold(scores: Floats, truth: Floats, threshold: float, patient: Ints, drawn: NDArray[np.float32]) -> Floats:
    """THRESHOLDED, (4, R); NaN without a threshold."""
    if np.isnan(threshold):
        return np.full((len(THRESHOLDED), drawn.shape[1]), np.nan)
    said = scores >= threshold
    cells = [(truth == value) & (said == call) for value, call in ((1, True), (0, True), (1, False), (0, False))]
    counts = drawn.T.astype(np.float64) @ sum_by(patient, np.stack(cells, axis=1), len(drawn))  # (R, 4)
    tp, fp, fn, tn = counts.T
    found = np.stack([*f1_and_mcc(tp, fp, fn, tn), _ratio(tp, tp + fn), _ratio(tn, tn + fp)])
    found[:, (tp + fn == 0) | (tn + fp == 0)] = np.nan
    return found


def _ratio(above: Floats, below: Floats) -> Floats:
    """above / below, 0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)


def _share(above: Floats, below: Floats) -> Floats:
    """above / below, NaN where `below` is 0."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


PERCENTILES = (2.5, 97.5)
ROUNDS = 1000
"""Draws, unless told otherwise."""
_ELEMENTS = 1 << 23
"""Most counts held at once: 32 MiB of float32, and a few times that while a label is scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patients:
    """Which rows are drawn together."""

    of_row: Ints
    """(N,) number of each row's patient, from 0 to count - 1."""
    count: int
    unit: str
    """What is drawn: `patient`, `film` where no patient is known, or `patient, or film without one`."""

    def drawn_once(self) -> NDArray[np.float32]:
        """The data as it is, as a draw: ones (count, 1)."""
        return np.ones((self.count, 1), np.float32)


def patients_of(groups: Ints) -> Patients:
    """Patients of rows (N,) by their group numbers; a row without one (NO_GROUP) stands for itself."""
    alone = groups == NO_GROUP
    unique = np.where(alone, -1 - np.arange(len(groups)), groups)
    names, of_row = np.unique(unique, return_inverse=True)
    unit = "film" if alone.all() else "patient, or film without one" if alone.any() else "patient"
    return Patients(of_row=of_row, count=len(names), unit=unit)


def draws(count: int, *, rounds: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """How often each of `count` patients is in each draw: parts (count, r) whose r add up to `rounds`."""
    rng = np.random.default_rng(seed)
    at_once = max(1, _ELEMENTS // count)
    for done in range(0, rounds, at_once):
        part = np.empty((count, min(at_once, rounds - done)), np.float32)
        for column in part.T:
            column[:] = np.bincount(rng.integers(count, size=count), minlength=count)
        yield part


def interval(values: Floats) -> list[float] | None:
    """The 95 % interval of a metric's values (rounds,), NaN left out; None where none is left."""
    known = values[~np.isnan(values)]
    return np.percentile(known, PERCENTILES).tolist() if len(known) else None


def mean_known(values: Floats) -> Floats:
    """Mean (...) over the labels of values (K, ...), those that are NaN left out; NaN where all are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "mean of empty slice", which NaN says as well
        return np.nanmean(values, axis=0) if len(values) else np.full(values.shape[1:], np.nan)
