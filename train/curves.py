"""curves.png: loss, learning rate, speed and waiting over the steps, from metrics.jsonl; ROC and precision-recall
curves of an evaluation, a small panel a label. PNG, without a display.

`python -m train.curves RUN` draws a run's at any time, of one that is still going on too.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from shards.atomic import write_atomic
from shards.cli import main_guard, parse, say
from shards.errors import InputError
from train.rows import Row, films_since, is_number, read_rows
from train.rundir import RunFolder, check_result
from train.scores import Floats

if TYPE_CHECKING:  # it needs torch, and curves of a run do not
    from train.scorecard import LabelScores

PROG = "train.curves"
_SMOOTH = 50
"""Rows or more of which a trend is drawn besides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvesConfig:
    """Draw loss, learning rate and speed of a run, finished or not."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    out: Path | None = None
    """Where the PNG goes; none: RUN/curves.png."""


def draw_curves(metrics: Path, out: Path) -> None:
    """Draw the rows of `metrics` to the PNG `out`; nothing where there are none."""
    rows = read_rows(metrics)
    if not rows:
        return
    figure = new_figure(11, 6.4)
    loss, rate, speed, wait = figure.subplots(2, 2, sharex=True).flat
    draw_loss(loss, rows)
    draw_line(rate, rows, "lr", "learning rate")
    rate.set(title="learning rate", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    draw_line(speed, rows, "images_per_s", "films/s")
    speed.set(title="films/s", xlabel="step", ylim=(0, None))
    draw_time(wait, rows)
    write_atomic(out, to_png(figure))


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure, inches, without a display and without the global state that pyplot has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Any) -> bytes:
    """The figure, drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def draw_loss(axes: Any, rows: list[Row], name: str = "", color: str = "C0") -> None:
    """Training loss, its trend where rows are many, and the validation loss with the best marked; `name` of the run."""
    label = name or "training"
    points = _points(rows, "loss")
    many = len(points) >= _SMOOTH
    axes.plot(*_columns(points), color=color, linewidth=0.8, alpha=0.3 if many else 0.9, label=None if many else label)
    if many:
        axes.plot(*_columns(trend(points)), color=color, linewidth=1.5, label=label)
    title = "InfoNCE loss" + _draw_validation(axes, rows, name, color)
    if since := films_since(rows):
        label = f"{name}: other films from here".removeprefix(": ")
        axes.axvline(since, color=color if name else "0.5", linewidth=0.9, linestyle=":", label=label)
    axes.set(title=title)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _draw_validation(axes: Any, rows: list[Row], name: str, color: str) -> str:
    """The validation losses, the best of those on the films of now marked; what to add to the title."""
    validated = _points(rows, "val_loss")
    own = [point for point in validated if point[0] > films_since(rows)]
    if not own:
        axes.plot(*_columns(validated), color=color if name else "C1", linewidth=1.2)
        return ""
    step, best = min(own, key=lambda point: point[1])
    said = f"best validation {best:.3f} at step {step:,}"
    line = {"color": color if name else "C1", "linewidth": 1.2, "linestyle": "--" if name else "-"}
    marker = "o" if len(validated) <= _SMOOTH else None
    label = f"{name}, {said}" if name else "validation"
    axes.plot(*_columns(validated), marker=marker, markersize=3.5, label=label, **line)
    axes.plot([step], [best], marker="*", markersize=12, color=line["color"], linestyle="none", zorder=5)
    return " (stars: best validation)" if name else f"; {said}"


def draw_time(axes: Any, rows: list[Row]) -> None:
    """Time a step, and how much of it waited for the loader."""
    draw_line(axes, rows, "step_ms", "step")
    draw_line(axes, rows, "loader_wait_ms", "of it waiting for the loader", color="C3", fill=True)
    axes.set(title="time a step, ms", xlabel="step", ylim=(0, None))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="center right")


def draw_line(axes: Any, rows: list[Row], name: str, label: str, *, color: str = "C0", fill: bool = False) -> None:
    """One figure of the rows over the steps; nothing where no row has it."""
    points = _points(rows, name)
    if points:
        axes.plot(*_columns(points), label=label, color=color, linewidth=1.2)
        if fill:
            axes.fill_between(*_columns(points), color=color, alpha=0.2, linewidth=0)
    axes.grid(alpha=0.25)


def trend(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over windows of about a fiftieth of the points, cut off at both ends."""
    half = max(1, len(points) // 100)
    windows = [points[max(0, number - half) : number + half + 1] for number in range(len(points))]
    return [(step, sum(value for _, value in w) / len(w)) for (step, _), w in zip(points, windows, strict=True)]


def _points(rows: list[Row], name: str) -> list[tuple[float, float]]:
    """(step, value) where a row has the figure and it is a number."""
    return [(row["step"], row[name]) for row in rows if is_number(row.get(name))]


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw a run's curves as the command line says. Exit code 2 for a user's mistake."""
    with main_guard(PROG):
        config = parse(CurvesConfig, argv, prog=PROG)
        folder = RunFolder(root=config.run)
        rows = read_rows(folder.metrics)
        if not rows:
            raise InputError(f"{folder.metrics} has no rows yet; give the folder of a run (train.main --out)")
        out = config.out or folder.curves
        check_result(out, ".png", "--out")
        draw_curves(folder.metrics, out)
        say(f"{out}: up to step {rows[-1]['step']}")


COLUMNS = 4
"""Panels side by side, at most."""
_PANEL = 2.6
"""Inches."""


def draw_roc(labels: "dict[str, LabelScores]", probabilities: Floats, truth: Floats, title: str) -> bytes:
    """True against false positive rate of K labels; probabilities, truth (N, K)."""
    from sklearn.metrics import roc_curve

    def panel(axes: Any, positive: Floats, score: Floats, found: "LabelScores") -> None:
        fall_out, recall, _ = roc_curve(positive, score)
        axes.plot([0, 1], [0, 1], color="0.75", linewidth=0.8)
        axes.plot(fall_out, recall)
        if found.sensitivity is not None and found.specificity is not None:
            axes.plot(1 - found.specificity, found.sensitivity, "o", color="C1", markersize=5)
        _note(axes, found, "auroc", "AUROC", 0.06)

    return _draw(labels, probabilities, truth, panel, (title, "1 - specificity", "sensitivity"))


def draw_precision_recall(labels: "dict[str, LabelScores]", probabilities: Floats, truth: Floats, title: str) -> bytes:
    """Precision against recall of K labels, above the precision of guessing; probabilities, truth (N, K)."""
    from sklearn.metrics import precision_recall_curve

    def panel(axes: Any, positive: Floats, score: Floats, found: "LabelScores") -> None:
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
    labels: "dict[str, LabelScores]",
    probabilities: Floats,
    truth: Floats,
    panel: "Callable[[Any, Floats, Floats, LabelScores], None]",
    words: tuple[str, str, str],
) -> bytes:
    """The PNG. A label that lacks positives or negatives has an empty panel that says so."""
    rows = math.ceil(len(labels) / COLUMNS)
    columns = math.ceil(len(labels) / rows)
    figure = new_figure(_PANEL * columns, _PANEL * rows + 0.4)
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
    return to_png(figure)


def _note(axes: Any, found: "LabelScores", metric: str, name: str, height: float) -> None:
    value, between = getattr(found, metric), found.intervals[metric]
    span = f" ({between[0]:.2f}-{between[1]:.2f})" if between else ""
    axes.text(0.97, height, f"{name} {value:.2f}{span}", ha="right", fontsize=8, transform=axes.transAxes)


if __name__ == "__main__":
    main()
