"""Bootstrap intervals over patients: films of one patient are drawn together, for they are not independent.

A draw takes as many patients as there are, with replacement, with all their films; the 2.5th and 97.5th percentile of
a metric over the draws are its 95 % interval. All labels see the same draws, so that their mean has an interval too. A
draw in which a label has no positive or no negative says nothing of the label and is left out of its interval and mean.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.schema import NO_GROUP
from train.scores import RANKED, Floats, Ints, score_labels

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


def intervals(values: Floats) -> list[list[float] | None]:
    """Intervals of each of values (K, rounds)."""
    return [interval(row) for row in values]


def mean_known(values: Floats) -> Floats:
    """Mean (...) over the labels of values (K, ...), those that are NaN left out; NaN where all are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "mean of empty slice", which NaN says as well
        return np.nanmean(values, axis=0) if len(values) else np.full(values.shape[1:], np.nan)


def auroc_intervals(
    scores: NDArray[Any], truth: NDArray[Any], groups: Ints, *, seed: int, rounds: int = ROUNDS
) -> list[list[float] | None]:
    """Intervals of the AUROC of each of K labels and, last, of their mean. scores, truth (N, K); groups (N,)."""
    patients = patients_of(groups)
    none = np.full(scores.shape[1], np.nan)
    parts = [
        score_labels(scores, truth, none, patients.of_row, drawn)[RANKED.index("auroc")]
        for drawn in draws(patients.count, rounds=rounds, seed=seed)
    ]
    values = np.concatenate(parts, axis=1)
    return intervals(np.concatenate([values, mean_known(values)[None]]))
