"""curves.png: loss, learning rate, speed and waiting over the steps, from metrics.jsonl.

`python -m train.curves RUN` draws it at any time, of a run that is still going on too.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from shards.atomic import check_writable, write_atomic
from shards.cli import main_guard, parse, say
from shards.errors import InputError
from train.metrics import Row, read_rows
from train.rundir import RunFolder

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
    save_figure(figure, out)


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure, inches, without a display and without the global state that pyplot has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, out: Path) -> None:
    """Write the PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(out, buffer.getvalue())


def draw_loss(axes: Any, rows: list[Row], name: str = "", color: str = "C0") -> None:
    """Training loss, its trend where rows are many, and the validation loss with the best marked; `name` of the run."""
    label = name or "training"
    points = _points(rows, "loss")
    many = len(points) >= _SMOOTH
    axes.plot(*_columns(points), color=color, linewidth=0.8, alpha=0.3 if many else 0.9, label=None if many else label)
    if many:
        axes.plot(*_columns(trend(points)), color=color, linewidth=1.5, label=label)
    validated = _points(rows, "val_loss")
    title = "InfoNCE loss"
    if validated:
        step, best = min(validated, key=lambda point: point[1])
        said = f"best validation {best:.3f} at step {step:,}"
        title = f"{title}; {said}" if not name else f"{title} (stars: best validation)"
        line = {"color": color if name else "C1", "linewidth": 1.2, "linestyle": "--" if name else "-"}
        marker = "o" if len(validated) <= _SMOOTH else None
        label = f"{name}, {said}" if name else "validation"
        axes.plot(*_columns(validated), marker=marker, markersize=3.5, label=label, **line)
        axes.plot([step], [best], marker="*", markersize=12, color=line["color"], linestyle="none", zorder=5)
    axes.set(title=title)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


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
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


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
        check_writable(out)
        draw_curves(folder.metrics, out)
        say(f"{out}: up to step {rows[-1]['step']}")


if __name__ == "__main__":
    main()
