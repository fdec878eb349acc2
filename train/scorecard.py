"""Predictions to results: every label's scores with their intervals, as records, a CSV and a table for people; and
what a reader has to know beside the figures.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import numpy as np

from shards.schema import Manifest
from train.retrieval import TOP, Retrieval
from train.scores import METRICS, Floats, Patients, draws, interval, mean_known, score_labels

NAME_WIDTH = 26
"""Of a label in the table, which is 100 columns wide at most; `Enlarged Cardiomediastinum` fits."""

Interval = list[float] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Six metrics, None where one cannot be worked out, and their 95 % intervals by name."""

    auroc: float | None
    average_precision: float | None
    f1: float | None
    mcc: float | None
    sensitivity: float | None
    specificity: float | None
    intervals: dict[str, Interval]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelScores(Scores):
    """One label's result. All None where there is no positive or no negative film."""

    threshold: float | None
    """Probability from which a film counts as positive, chosen on val; F1, MCC, sensitivity and specificity are at it.
    """
    positives: int
    negatives: int
    positive_patients: int
    """Patients of the positive films; films, where no patient is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanScores(Scores):
    """Means over the labels that have the metric."""

    labels: dict[str, int]
    """How many labels are in each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The result over one split."""

    checkpoints: list[dict[str, Any]]
    """Step, and whose weights, of each that is averaged."""
    split: str
    samples: int
    patients: int
    """How many were drawn from."""
    unit: str
    """What was drawn for the intervals: patient, or film where no patient is known."""
    notes: list[str]
    """What a reader of the figures has to know."""
    labels: dict[str, LabelScores]
    mean: MeanScores
    retrieval: Retrieval | None

    @property
    def auroc(self) -> dict[str, float | None]:
        """AUROC by label."""
        return {name: scores.auroc for name, scores in self.labels.items()}


def score_split(
    names: Sequence[str],
    probabilities: Floats,
    truth: Floats,
    thresholds: Floats,
    patients: Patients,
    *,
    rounds: int,
    seed: int,
) -> tuple[dict[str, LabelScores], MeanScores]:
    """Scores of K labels and their mean, from probabilities and truth (N, K) and thresholds (K,), NaN for none."""
    data = (probabilities, truth, thresholds, patients.of_row)
    points = score_labels(*data, patients.drawn_once())[:, :, 0]  # (6, K)
    parts = [score_labels(*data, drawn) for drawn in draws(patients.count, rounds=rounds, seed=seed)]
    drawn = np.concatenate([np.empty((*points.shape, 0)), *parts], axis=2)  # (6, K, rounds)
    labels = {}
    for number, name in enumerate(names):
        positive = truth[:, number] == 1
        labels[name] = LabelScores(
            **_scores(points[:, number], drawn[:, number]),
            threshold=_known(thresholds[number]),
            positives=int(positive.sum()),
            negatives=int((truth[:, number] == 0).sum()),
            positive_patients=len(np.unique(patients.of_row[positive])),
        )
    counts = dict(zip(METRICS, (~np.isnan(points)).sum(axis=1).tolist(), strict=True))
    mean = _scores(mean_known(points.swapaxes(0, 1)), mean_known(drawn.swapaxes(0, 1)))
    return labels, MeanScores(**mean, labels=counts)


def _scores(points: Floats, drawn: Floats) -> dict[str, Any]:
    """Fields of Scores from values (6,) and draws (6, rounds)."""
    values = dict(zip(METRICS, map(_known, points), strict=True))
    return {**values, "intervals": dict(zip(METRICS, map(interval, drawn), strict=True))}


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def to_csv(labels: dict[str, LabelScores], mean: MeanScores) -> str:
    """A line a label and one for the mean: each metric with its interval, threshold, counts."""
    header = ["label", *(f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high"))]
    counts = ["threshold", "positives", "negatives", "positive_patients"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*header, *counts])
    for name, scores in [*labels.items(), ("mean", mean)]:
        cells: list[Any] = [name]
        for metric in METRICS:
            cells += [getattr(scores, metric), *(scores.intervals[metric] or (None, None))]
        writer.writerow(cells + [getattr(scores, count, None) for count in counts])
    return out.getvalue()


def table(result: Evaluation, resamples: int) -> str:
    """The result for people, at most 100 columns wide."""
    films = f"{result.samples:,} films of {result.patients:,} patients"
    what = "zero-shot on" if result.labels else "retrieval alone on"
    lines = [f"{what} {result.split}, {films if result.unit == 'patient' else f'{result.samples:,} films'}"]
    if resamples:
        lines[0] += f"; 95 % intervals from {resamples:,} draws of a {result.unit}"
    if result.labels:
        lines += label_table(result.labels, result.mean)
    if result.retrieval:
        lines += [
            "",
            f"retrieval, {result.retrieval.gallery:,} films, {result.retrieval.distinct_reports:,} different reports",
        ]
        lines += retrieval_table(result.retrieval)
    return "\n".join([*lines, *(line for note in result.notes for line in wrap(f"note: {note}", 100))])


def label_table(labels: dict[str, LabelScores], mean: MeanScores) -> list[str]:
    """A line a label, at most 100 columns wide."""
    head = f"{'AUROC (95 %)':<19}  {'AP (95 %)':<19}  {'F1':>5} {'MCC':>6} {'present':>7} {'absent':>7}"
    lines = [f"{'':{NAME_WIDTH}} {head}"]
    for name, scores in labels.items():
        lines.append(f"{_row(name, scores)} {scores.positives:7} {scores.negatives:7}")
    return [*lines, _row("mean", mean)]


def _row(name: str, scores: Scores) -> str:
    short = name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 3] + "..."
    ranked = "  ".join(_figure(getattr(scores, m), scores.intervals[m]) for m in ("auroc", "average_precision"))
    return f"{short:{NAME_WIDTH}} {ranked}  {_number(scores.f1):>5} {_number(scores.mcc):>6}"


def retrieval_table(found: Retrieval) -> list[str]:
    """Both directions, and what chance would give."""
    head = "  ".join(f"{f'R@{k} (95 %)':<19}" for k in TOP)
    lines = [f"{'':14} {head}  median rank"]
    for name, way in (("film to report", found.image_to_text), ("report to film", found.text_to_image)):
        cells = "  ".join(_figure(recall.recall, recall.interval) for recall in way.recall.values())
        lines.append(f"{name:14} {cells}  {way.median_rank:11,.0f}")
        lines.append(
            f"{'  by chance':14} {'  '.join(f'{recall.chance:<19.3f}' for recall in way.recall.values())}".rstrip()
        )
    return lines


def _figure(value: float | None, between: Interval) -> str:
    span = f" ({between[0]:.3f}-{between[1]:.3f})" if between else ""
    return f"{_number(value) + span:<19}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def split_notes(manifest: Manifest, split: str, *, choosing: bool, unit: str) -> list[str]:
    """What the split and its patients mean for all figures. `choosing`: val has films to choose thresholds on."""
    notes = []
    if split == "val":
        absent = "" if manifest.rows("test") else ", for there is no test split"
        notes.append(
            f"scored on val{absent}: checkpoint and thresholds were chosen on these films; expect less of others"
        )
    if split == "train":
        notes.append("scored on train: the model was trained on these films")
    if not manifest.labels:
        notes.append("no label columns: retrieval alone")
    elif not choosing:
        notes.append("there is no film of val to choose thresholds on: no F1, MCC, sensitivity, specificity")
    if unit != "patient":
        notes.append(f"intervals are over draws of a {unit}; where patients have several films they are too narrow")
    return notes


def label_notes(labels: dict[str, LabelScores], *, unused: Sequence[str], choosing: bool) -> list[str]:
    """Labels that something is missing for. `unused`: labels of the prompts' file that the data set does not have."""
    notes = []
    without = [name for name, scores in labels.items() if scores.auroc is None]
    unchosen = [name for name, scores in labels.items() if scores.auroc is not None and scores.threshold is None]
    if without:
        count = f"{len(without)} of {len(labels)} labels"
        notes.append(f"{count} lack positives or negatives and are in no mean: {', '.join(without)}")
    if unchosen and choosing:
        notes.append(f"without a threshold, for val lacks positives or negatives: {', '.join(unchosen)}")
    if unused:
        notes.append(f"the prompts' file names labels that these shards do not have: {', '.join(unused)}")
    return notes
