"""ROC and precision-recall curves, a small panel a label, with the point at the threshold; PNG, without a display."""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from train.scorecard import LabelScores
from train.scores import Floats

COLUMNS = 4
"""Panels side by side, at most."""
_PANEL = 2.6
"""Inches."""


def draw_roc(labels: dict[str, LabelScores], probabilities: Floats, truth: Floats, title: str) -> bytes:
    """True against false positive rate of K labels; probabilities, truth (N, K)."""
    from sklearn.metrics import roc_curve

    def panel(axes: Any, positive: Floats, score: Floats, found: LabelScores) -> None:
        fall_out, recall, _ = roc_curve(positive, score)
        axes.plot([0, 1], [0, 1], color="0.75", linewidth=0.8)
        axes.plot(fall_out, recall)
        if found.sensitivity is not None and found.specificity is not None:
            axes.plot(1 - found.specificity, found.sensitivity, "o", color="C1", markersize=5)
        _note(axes, found, "auroc", "AUROC", 0.06)

    return _draw(labels, probabilities, truth, panel, (title, "1 - specificity", "sensitivity"))


def draw_precision_recall(labels: dict[str, LabelScores], probabilities: Floats, truth: Floats, title: str) -> bytes:
    """Precision against recall of K labels, above the precision of guessing; probabilities, truth (N, K)."""
    from sklearn.metrics import precision_recall_curve

    def panel(axes: Any, positive: Floats, score: Floats, found: LabelScores) -> None:
        precision, recall, _ = precision_recall_curve(positive, score)
        axes.axhline(positive.mean(), color="0.75", linewidth=0.8)
        axes.step(recall, precision, where="post")  # recall falls along the arrays: the steps of average precision
        if found.sensitivity is not None and found.threshold is not None:
            called = score >= found.threshold
            if called.any():
                axes.plot(found.sensitivity, positive[called].mean(), "o", color="C1", markersize=5)
        _note(axes, found, "average_precision", "AP", 0.06 if positive.mean() > 0.25 else 0.9)

    return _draw(labels, probabilities, truth, panel, (title, "recall", "precision"))


def _draw(
    labels: dict[str, LabelScores],
    probabilities: Floats,
    truth: Floats,
    panel: Callable[[Any, Floats, Floats, LabelScores], None],
    words: tuple[str, str, str],
) -> bytes:
    """The PNG. A label that lacks positives or negatives has an empty panel that says so."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state as pyplot has
    from matplotlib.figure import Figure

    rows = math.ceil(len(labels) / COLUMNS)
    columns = math.ceil(len(labels) / rows)
    figure = Figure(figsize=(_PANEL * columns, _PANEL * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for number, (axes, (name, found)) in enumerate(zip(grid, labels.items(), strict=False)):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.set_title(name if len(name) <= 28 else name[:25] + "...", fontsize=9, parse_math=False)
        known = ~np.isnan(truth[:, number])
        if found.auroc is None:
            axes.text(0.5, 0.5, f"{found.positives} present, {found.negatives} absent", ha="center", fontsize=8)
        else:
            panel(axes, truth[known, number], probabilities[known, number], found)
    for axes in grid[len(labels) :]:
        axes.set_axis_off()
    for axes in grid[max(0, len(labels) - columns) : len(labels)]:
        axes.tick_params(labelbottom=True)
    title, across, up = words
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.supxlabel(across, fontsize=9)
    figure.supylabel(up, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _note(axes: Any, found: LabelScores, metric: str, name: str, height: float) -> None:
    value, between = getattr(found, metric), found.intervals[metric]
    span = f" ({between[0]:.2f}-{between[1]:.2f})" if between else ""
    axes.text(0.97, height, f"{name} {value:.2f}{span}", ha="right", fontsize=8, transform=axes.transAxes)
