"""Plots of the bench, narrow enough for a phone: bars with every round, films/s against latency, cost against size."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.kinds import METRICS, Case, Result, items, mapping, number
from bench.page import Plot

WIDTH = 4.6
"""Inches; letters of 9 points stay readable where a page is 360 pixels wide."""
MOST_BARS, MOST_LETTERS = 24, 28
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


def plots_of(result: Result) -> tuple[Plot, ...]:
    """Whatever a result has to show."""
    found = [_bars(result), _latency(result), _memory(result)]
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
            return _bar_plot(cases, metric)
    return None


def _bar_plot(cases: Sequence[Case], metric: str) -> Panel:
    title = f"{METRICS[metric].title}: median (bar) and rounds (dots)"

    def fill(axes: Any) -> None:
        places = range(len(cases))
        axes.barh(places, [case.median(metric) for case in cases], color="#9db8d9")
        for place, case in zip(places, cases, strict=True):
            values = case.rounds[metric]
            axes.plot(values, [place] * len(values), ".", color="#1f3d66", markersize=4)
        axes.set_yticks(places, [_short(case.label) for case in cases])
        axes.invert_yaxis()
        axes.set_xlim(0, None if any(any(case.rounds[metric]) for case in cases) else 1)

    return Panel(title=title, fill=fill, height=0.8 + 0.26 * len(cases))


def _latency(result: Result) -> Panel | None:
    """Films/s against the latency of a slow file system."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for case in result.cases:
        rate = case.median("images_per_s")
        if case.latency_ms is not None and rate is not None:
            lines.setdefault(case.name, []).append((case.latency_ms, rate))
    if not any(len(points) > 1 for points in lines.values()):
        return None
    title = "films/s where each read waits"

    def fill(axes: Any) -> None:
        for name, points in list(lines.items())[:10]:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=_short(name))
        axes.set(xlabel="latency of a read, ms", yscale="log")
        _plain_ticks(axes, "y")
        _legend(axes)

    return Panel(title=title, fill=fill, height=3.0)


def _memory(result: Result) -> Panel | None:
    """Memory of an ingest against its input."""
    runs = [mapping(run) for run in items(mapping(result.raw.get("memory")).get("runs"))]
    points = [(number(run.get("gigabytes")), number(run.get("peak"))) for run in runs]
    known = sorted((size, peak / 2**20) for size, peak in points if size is not None and peak is not None)
    if result.kind != "ingest" or len(known) < 2:
        return None
    title = "memory of an ingest, MiB"

    def fill(axes: Any) -> None:
        axes.plot(*zip(*known, strict=True), marker="o", markersize=3)
        axes.set(xlabel="input, GB of float32", ylim=(0, None))

    return Panel(title=title, fill=fill, height=2.2)


def scale_panels(raw: Any) -> list[Panel | None]:
    """Cost against samples, shards, ranks, threads; see `bench.scale`."""
    start = {"first_batch_s": "first batch", "manifest_s": "of it the manifest", "order_s": "of it the order"}
    memory = {"kept_bytes": "kept", "peak_bytes": "at most"}
    samples, shards, ranks = raw.get("samples"), raw.get("shards"), raw.get("ranks")
    return [
        _curves(samples, "samples", start, "seconds to the first batch"),
        _curves(samples, "samples", memory, "bytes of the order in memory"),
        _curves(samples, "samples", {"locate_us": "a batch"}, "microseconds to locate a batch", fixed=True),
        _curves(shards, "shards", start, "seconds to the first batch, the same samples"),
        _curves(ranks, "ranks", {"ratio": "reads"}, "reads a block in an epoch, all ranks together", fixed=True),
        _thread_plot(raw.get("cases")),
    ]


def _curves(rows: Any, over: str, names: dict[str, str], title: str, *, fixed: bool = False) -> Panel | None:
    """One line a name against `over`, both axes logarithmic; `fixed`: the vertical one from zero."""
    found = [mapping(row) for row in items(rows)]
    lines = {name: _points(found, over, name) for name in names}
    if not any(len(points) > 1 for points in lines.values()):
        return None

    def fill(axes: Any) -> None:
        for name, points in lines.items():
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=names[name])
        axes.set(xlabel=over, xscale="log", yscale="linear" if fixed else "log")
        _plain_ticks(axes, "x" if fixed else "xy")
        if fixed:
            axes.set_ylim(0, 1.2 * max(y for points in lines.values() for _, y in points))
        if len(lines) > 1:
            _legend(axes)

    return Panel(title=title, fill=fill, height=2.4)


def _points(rows: Sequence[dict[str, Any]], over: str, name: str) -> list[tuple[float, float]]:
    pairs = [(number(row.get(over)), number(row.get(name))) for row in rows if not row.get("selected_share")]
    return sorted((x, y) for x, y in pairs if x and y is not None)


def _thread_plot(cases: Any) -> Panel | None:
    """Films/s against threads, and what so many times one thread would be."""
    rows = [mapping(row) for row in items(cases)]
    points = _points(rows, "threads", "images_per_s")
    if len(points) < 2:
        return None
    title = "films/s of the loader"

    def fill(axes: Any) -> None:
        first = points[0]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label="measured")
        axes.plot([x for x, _ in points], [first[1] * x / first[0] for x, _ in points], "--", label="in proportion")
        axes.set(xlabel="threads", xlim=(0, None), ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(axes)

    return Panel(title=title, fill=fill, height=2.4)


def _legend(axes: Any) -> None:
    """Below the axes, where it hides no line."""
    axes.figure.legend(loc="outside lower left", ncols=3, fontsize=8, frameon=False)


def _plain_ticks(axes: Any, which: str) -> None:
    """Logarithmic ticks as 1 k, 1 M: powers of ten would be formulas, which names must not be taken for."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    for axis in (getattr(axes, f"{name}axis") for name in which):
        axis.set_major_formatter(EngFormatter(sep=""))
        axis.set_minor_formatter(NullFormatter())


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"
