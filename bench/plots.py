"""Plots of the bench, narrow enough for a phone: bars with every round, films/s against latency, cost against size."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.kinds import METRICS, Result, Row
from bench.page import Plot

WIDTH = 4.6
"""Inches; letters of 9 points stay readable where a page is 360 pixels wide."""
MOST_BARS, MOST_LINES, MOST_LETTERS = 24, 10, 28
_STYLE: Any = {
    "font.size": 9,
    "text.parse_math": False,  # a name with a dollar is a name
    "svg.hashsalt": "shardclip",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """A picture to be drawn."""

    title: str
    fill: Callable[[Any], None]
    """Draws on the axes that it is given."""
    height: float = 2.4
    """Inches."""


Lines = dict[str, list[tuple[float, float]]]
"""Name of a line -> its points."""


def plots_of(result: Result) -> tuple[Plot, ...]:
    """Whatever a result has to show."""
    found = [_bars(result), _latency(result)]
    if result.kind == "ingest":
        found.append(_memory(result.raw.get("memory", {}).get("runs", [])))
    if result.kind == "scale":
        found += scale_panels(result.raw)
    return tuple(Plot(title=panel.title, svg=draw([panel], "svg")) for panel in found if panel is not None)


def draw(panels: Sequence[Panel], form: str, columns: int = 1) -> bytes:
    """Panels as one picture, SVG or PNG. The same input gives the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    size = WIDTH * columns, rows * max(panel.height for panel in panels)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        for panel, part in zip(panels, figure.subfigures(rows, columns, squeeze=False).flat, strict=False):
            part.suptitle(panel.title, x=0.02, ha="left", fontsize=10)
            panel.fill(part.subplots())
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, metadata=_NO_METADATA if form == "svg" else None, dpi=150)
    return buffer.getvalue()


def _bars(result: Result) -> Panel | None:
    """Medians as bars, each round as a dot."""
    for metric in ("images_per_s", "step_ms"):
        cases = [case for case in result.cases if case.rounds.get(metric) and not case.latency_ms][:MOST_BARS]
        if cases:
            break
    else:
        return None

    def fill(axes: Any) -> None:
        places = range(len(cases))
        axes.barh(places, [case.median(metric) for case in cases], color="#9db8d9")
        for place, case in zip(places, cases, strict=True):
            values = case.rounds[metric]
            axes.plot(values, [place] * len(values), ".", color="#1f3d66", markersize=4)
        axes.set_yticks(places, [_short(case.label) for case in cases])
        axes.invert_yaxis()
        axes.set_xlim(left=0)

    title = f"{METRICS[metric].title}: median (bar) and rounds (dots)"
    return Panel(title=title, fill=fill, height=0.8 + 0.26 * len(cases))


def _line_plot(title: str, lines: Lines, over: str, *, log: str = "", height: float = 2.4) -> Panel | None:
    """Lines against `over`; `log` names the axes that are logarithmic, the others begin at zero. None: only points."""
    if not any(len(points) > 1 for points in lines.values()):
        return None

    def fill(axes: Any) -> None:
        for name, points in list(lines.items())[:MOST_LINES]:
            style = "--" if name == IN_PROPORTION else "-"
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=_short(name))
        axes.set(xlabel=over)
        for each in "xy":
            _scale(axes, each, log=each in log)
        if len(lines) > 1:  # below the axes, where it hides no line
            axes.figure.legend(loc="outside lower left", ncols=3, fontsize=8, frameon=False)

    return Panel(title=title, fill=fill, height=height)


def _scale(axes: Any, which: str, *, log: bool) -> None:
    """From zero; or logarithmic with ticks as 1 k, 1 M: powers of ten would be formulas, which names must not be."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    if not log:
        axes.set(**{f"{which}lim": (0, None)})
        if which == "x":
            axes.locator_params("x", integer=True)  # threads, milliseconds, gigabytes
        return
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


IN_PROPORTION = "in proportion"
"""Name of the line of what would be if all grew alike."""


def _latency(result: Result) -> Panel | None:
    """Films/s against the latency of a slow file system."""
    lines: Lines = {}
    for case in result.cases:
        if case.latency_ms is not None and (rate := case.median("images_per_s")) is not None:
            lines.setdefault(case.name, []).append((case.latency_ms, rate))
    return _line_plot("films/s where each read waits", lines, "latency of a read, ms", log="y", height=3.0)


def _memory(runs: Sequence[Row]) -> Panel | None:
    points = sorted((run["gigabytes"], run["peak"] / 2**20) for run in runs)
    return _line_plot("memory of an ingest, MiB", {"peak": points}, "input, GB of float32", height=2.2)


def scale_panels(raw: Row) -> list[Panel | None]:
    """Cost against samples, shards, ranks, threads; see `bench.scale`."""
    start = {"first_batch_s": "first batch", "manifest_s": "of it the manifest", "order_s": "of it the order"}
    memory = {"kept_bytes": "kept", "peak_bytes": "at most"}
    samples = [row for row in raw["samples"] if not row.get("selected_share")]
    threads = _points(raw["cases"], "threads", "images_per_s")
    lines = {
        "measured": threads,
        IN_PROPORTION: [(count, threads[0][1] * count / threads[0][0]) for count, _ in threads],
    }
    return [
        _curves("seconds to the first batch", samples, "samples", start, log="xy"),
        _curves("bytes of the order in memory", samples, "samples", memory, log="xy"),
        _curves("microseconds to locate a batch", samples, "samples", {"locate_us": "a batch"}, log="x"),
        _curves("seconds to the first batch, the same samples", raw["shards"], "shards", start, log="xy"),
        _curves("reads a block in an epoch, all ranks together", raw["ranks"], "ranks", {"ratio": "reads"}, log="x"),
        _line_plot("films/s of the loader", lines, "threads"),
    ]


def _curves(title: str, rows: Sequence[Row], over: str, names: dict[str, str], *, log: str) -> Panel | None:
    """A line for each of these keys of the rows that have it."""
    lines = {shown: points for name, shown in names.items() if (points := _points(rows, over, name))}
    return _line_plot(title, lines, over, log=log)


def _points(rows: Sequence[Row], over: str, name: str) -> list[tuple[float, float]]:
    return sorted((row[over], row[name]) for row in rows if row.get(name) is not None)


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"
