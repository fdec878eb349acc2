"""curves.png: loss, learning rate and speed over the steps, from metrics.jsonl."""

import io
from pathlib import Path

from shards.atomic import write_atomic
from train.metrics import Row, read_rows


def draw_curves(metrics: Path, out: Path) -> None:
    """Draw the rows of `metrics` to the PNG `out`; nothing where there are none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state as pyplot has
    from matplotlib.figure import Figure

    rows = [row for row in read_rows(metrics) if "loss" in row]
    if not rows:
        return
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate, speed = figure.subplots(1, 3)
    _line(loss, rows, "loss", "training")
    _line(loss, rows, "val_loss", "validation", marker="o")
    loss.set(title="InfoNCE loss (best validation is kept)", xlabel="step")
    loss.legend()
    _line(rate, rows, "lr", "learning rate")
    rate.set(title="learning rate", xlabel="step")
    _line(speed, rows, "step_ms", "step")
    _line(speed, rows, "loader_wait_ms", "of it waiting for the loader")
    speed.set(title="time a step, ms", xlabel="step", ylim=(0, None))
    speed.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(out, buffer.getvalue())


def _line(axes, rows: list[Row], name: str, label: str, marker: str | None = None) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, marker=marker)
