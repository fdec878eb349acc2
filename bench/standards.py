"""DESIGN.md's "Standards of speed", each with the figure that the results give and whether it is reached.

A standard is read from the newest result that measured it as the table says: on two cores, on an H200, without a slow
file system. A figure of another machine does not count.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from bench.kinds import Case, Result, items, mapping, number, ratios, text

CORES, BATCH = 2, 64
GPU = "H200"
RECIPE, RECIPE_STEPS = "cxr-dinov3-clip", 25_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """What was measured."""

    value: float
    shown: str
    """With its unit and spread."""
    file: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Standard:
    """One thing to reach."""

    what: str
    wanted: float
    unit: str
    """How a value is written, a format string."""
    measure: Callable[[Sequence[Result]], Figure | None]
    at_most: bool = False
    """The value is not to exceed `wanted`, instead of to reach it."""

    def reached(self, figure: Figure | None) -> bool | None:
        """None where it was not measured."""
        if figure is None:
            return None
        return figure.value <= self.wanted if self.at_most else figure.value >= self.wanted

    @property
    def goal(self) -> str:
        """What to reach, in words."""
        return ("under " if self.at_most else "") + self.unit.format(self.wanted)


def judged(results: Sequence[Result]) -> Iterator[tuple[Standard, Figure | None, bool | None]]:
    """All standards with their figures. `results` oldest first."""
    for standard in STANDARDS:
        figure = standard.measure(results)
        yield standard, figure, standard.reached(figure)


def _newest(results: Sequence[Result], figure: Callable[[Result], Figure | None]) -> Figure | None:
    return next((found for result in reversed(results) if (found := figure(result)) is not None), None)


def _spread(result: Result, values: Sequence[float], form: str = "{:.2f}x") -> Figure | None:
    if not values:
        return None
    middle = median(values)
    ends = f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else ""
    return Figure(value=middle, shown=form.format(middle) + ends, file=result.file)


def _on_two_cores(result: Result) -> bool:
    """The loader bench on two cores, two threads or workers, files where they are as fast as they can be."""
    slow = any(mapping(result.raw.get("settings")).get(name) for name in ("latency_ms", "bandwidth_mb", "cold"))
    machine = result.machine.startswith(f"{CORES} CPUs") and "no GPU" in result.machine
    return result.kind == "loader" and machine and result.settings.get("threads") == str(CORES) and not slow


def _loader_ratio(ours: str, base: str, form: str = "{:.2f}x") -> Callable[[Sequence[Result]], Figure | None]:
    """Films/s of one case to another's, within rounds."""

    def measure(result: Result) -> Figure | None:
        one, other = result.case(ours), result.case(base)
        if not _on_two_cores(result) or one is None or other is None:
            return None
        return _spread(result, _rates(one, other), form)

    return lambda results: _newest(results, measure)


def _rates(one: Case, other: Case) -> tuple[float, ...]:
    return ratios(one.rounds.get("images_per_s", ()), other.rounds.get("images_per_s", ()))


def _best_peer(results: Sequence[Result]) -> Figure | None:
    def measure(result: Result) -> Figure | None:
        best = _fastest([case for case in result.cases if case.peer and case.latency_ms is None])
        ours = result.case("cpu")
        if not _on_two_cores(result) or ours is None or best is None:
            return None
        figure = _spread(result, _rates(ours, best))
        return figure and Figure(value=figure.value, shown=f"{figure.shown}, {best.name}", file=figure.file)

    return _newest(results, measure)


def _ingest_of_floor(results: Sequence[Result]) -> Figure | None:
    """One worker, because the standard is per core; the most films."""

    def films(result: Result) -> float:
        return max((number(mapping(case).get("films")) or 0 for case in items(result.raw.get("cases"))), default=0)

    found = [result for result in results if result.kind == "ingest" and result.cases]
    for result in sorted(found, key=films, reverse=True):
        one = next((case for case in result.cases if case.name.startswith("1 worker,") and case.reference), None)
        if one is not None:
            figure = _spread(result, one.reference, "{:.2f}")
            return figure and Figure(value=figure.value, shown=f"{figure.shown}, {one.name}", file=figure.file)
    return None


def _ingest_memory(results: Sequence[Result]) -> Figure | None:
    def measure(result: Result) -> Figure | None:
        runs = [mapping(run) for run in items(mapping(result.raw.get("memory")).get("runs"))]
        sizes = [(number(run.get("gigabytes")) or 0.0, (number(run.get("peak")) or 0.0) / 2**20) for run in runs]
        if result.kind != "ingest" or not sizes:
            return None
        (small, least), (large, most) = min(sizes), max(sizes)
        shown = f"{most:,.0f} MiB at {large:g} GB of float32, {least:,.0f} MiB at {small:g} GB"
        return Figure(value=max(peak for _, peak in sizes), shown=shown, file=result.file)

    return _newest(results, measure)


def _start(samples: float) -> Callable[[Sequence[Result]], Figure | None]:
    """Seconds to the first batch of a set of about so many samples."""

    def measure(result: Result) -> Figure | None:
        rows = [mapping(row) for row in items(result.raw.get("samples"))] if result.kind == "scale" else []
        for row in rows:
            size, seconds = number(row.get("samples")), number(row.get("first_batch_s"))
            if size and seconds is not None and 0.95 < size / samples < 1.05:
                shown = f"{seconds:.2f} s, index {(number(row.get('kept_bytes')) or 0) / 1e6:.1f} MB"
                return Figure(value=seconds, shown=shown, file=result.file)
        return None

    return lambda results: _newest(results, measure)


def _recipe_cases(result: Result, *names: str) -> list[Case]:
    """The cases of these names of the recipe's step at its batch on the GPU."""
    of_recipe = GPU in result.machine and RECIPE in result.settings.get("preset", "")
    of_recipe = of_recipe and "latency_ms" not in result.settings
    size = BATCH if result.settings.get("batch_size", str(BATCH)) == str(BATCH) else 0
    found = [case for case in result.cases if case.name in names and (case.batch_size or size) == BATCH]
    return found if of_recipe else []


def _fastest(cases: Sequence[Case]) -> Case | None:
    measured = [case for case in cases if case.rounds.get("images_per_s")]
    return max(measured, key=lambda case: case.median("images_per_s") or 0.0, default=None)


def _ratio_of(result: Result, ours: Sequence[str], theirs: Sequence[str]) -> Figure | None:
    """Films/s of the fastest of ours to that of the fastest of theirs, within rounds."""
    one, other = _fastest(_recipe_cases(result, *ours)), _fastest(_recipe_cases(result, *theirs))
    return _spread(result, _rates(one, other)) if one and other else None


def _loader_to_step(results: Sequence[Result]) -> Figure | None:
    return _newest(results, lambda result: _ratio_of(result, ["loader alone"], ["resident"]))


def _waited(results: Sequence[Result]) -> Figure | None:
    def measure(result: Result) -> Figure | None:
        live = next(iter(_recipe_cases(result, "live")), None)
        return _spread(result, live.rounds.get("wait_share", ()), "{:.2%}") if live else None

    return _newest(results, measure)


def _to_open_clip(results: Sequence[Result]) -> Figure | None:
    ours, theirs = ("step", "step compiled"), ("open_clip", "open_clip compiled")
    return _newest(results, lambda result: _ratio_of(result, ours, theirs))


def _recipe(results: Sequence[Result]) -> Figure | None:
    """Minutes of the whole recipe, run or extrapolated."""

    def measure(result: Result) -> Figure | None:
        recipe = result.raw if result.kind == "recipe" and result.raw.get("preset") == RECIPE else {}
        seconds = number(recipe.get(f"seconds_{RECIPE_STEPS}"))
        if GPU not in result.machine or seconds is None:
            return None
        how = "run whole" if recipe.get("whole") else text(f"from {recipe.get('steps', '?')} steps")
        return Figure(value=seconds / 60, shown=f"{seconds / 60:.1f} minutes, {how}", file=result.file)

    return _newest(results, measure)


_TWO = "loader on 2 cores"
STANDARDS = (
    Standard(what=f"{_TWO} to hdf5", wanted=6, unit="{:g}x", measure=_loader_ratio("cpu", "hdf5")),
    Standard(what=f"{_TWO} to hdf5-tuned", wanted=3, unit="{:g}x", measure=_loader_ratio("cpu", "hdf5-tuned")),
    Standard(what=f"{_TWO} to the best peer", wanted=2.5, unit="{:g}x", measure=_best_peer),
    Standard(
        what=f"{_TWO} to its kernels alone",
        wanted=0.8,
        unit="{:g}",
        measure=_loader_ratio("cpu", "cpu floor", "{:.2f}"),
    ),
    Standard(what=f"{_TWO} from raw shards to hdf5", wanted=10, unit="{:g}x", measure=_loader_ratio("cpu raw", "hdf5")),
    Standard(what=f"loader on an {GPU} to the step of {RECIPE}", wanted=5, unit="{:g}x", measure=_loader_to_step),
    Standard(what=f"training on an {GPU} waits for data", wanted=0.01, unit="{:.0%}", measure=_waited, at_most=True),
    Standard(
        what=f"{RECIPE}, {RECIPE_STEPS:,} steps on one {GPU}",
        wanted=15,
        unit="{:g} minutes",
        measure=_recipe,
        at_most=True,
    ),
    Standard(what=f"training step on an {GPU} to open_clip's", wanted=1.3, unit="{:g}x", measure=_to_open_clip),
    Standard(what="ingest to reading and encoding alone, per core", wanted=0.8, unit="{:g}", measure=_ingest_of_floor),
    Standard(what="memory of an ingest", wanted=1024, unit="{:g} MiB", measure=_ingest_memory, at_most=True),
    Standard(what="first batch of 462,000 samples", wanted=2, unit="{:g} s", measure=_start(462_000), at_most=True),
    Standard(what="first batch of 100 million samples", wanted=2, unit="{:g} s", measure=_start(1e8), at_most=True),
)
"""The table of DESIGN.md, row by row."""
