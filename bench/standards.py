"""DESIGN.md's "Standards of speed", each with the figure that the results give and whether it is reached.

A standard is read from the newest result that measured it as the table says: on two cores, on an H200, without a slow
file system. A figure of another machine does not count.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from bench.kinds import Case, Result, ratios, spread

CORES, BATCH = 2, 64
GPU = "H200"
RECIPE, RECIPE_STEPS = "cxr-dinov3-clip", 25_000
TRAINERS = ("step", "step compiled"), ("open_clip", "open_clip compiled")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """What was measured."""

    value: float
    shown: str
    """With its unit and spread."""
    file: str
    films: float = 0.0
    """Of an ingest: the figure of most films counts, not the newest."""


Measure = Callable[[Result], Figure | None]


@dataclass(frozen=True, slots=True)
class Standard:
    """One thing to reach."""

    what: str
    wanted: float
    unit: str
    """How a value is written, a format string."""
    measure: Measure
    at_most: bool = False
    """The value is not to exceed `wanted`, instead of to reach it."""

    @property
    def goal(self) -> str:
        """What to reach, in words."""
        return ("under " if self.at_most else "") + self.unit.format(self.wanted)


def judged(results: Sequence[Result]) -> Iterator[tuple[Standard, Figure | None, bool | None]]:
    """All standards with their figures, and whether they are reached; None: not measured. `results` oldest first."""
    for standard in STANDARDS:
        found = [figure for result in reversed(results) if (figure := standard.measure(result))]
        figure = max(found, key=lambda each: each.films, default=None)  # the first, which is the newest, of equals
        sign = -1 if standard.at_most else 1
        yield standard, figure, None if figure is None else sign * figure.value >= sign * standard.wanted


def _figure(
    result: Result, values: Sequence[float], form: str = "{:.2f}x", more: str = "", films: float = 0.0
) -> Figure | None:
    """The median of values a round, with their spread and what is said besides."""
    if not values:
        return None
    return Figure(value=median(values), shown=spread(values, form) + more, file=result.file, films=films)


def _ratio(
    result: Result, one: Case | None, other: Case | None, form: str = "{:.2f}x", more: str = ""
) -> Figure | None:
    """Films/s of one case to those of another, within rounds."""
    if one is None or other is None:
        return None
    rates = ratios(one.rounds.get("images_per_s", ()), other.rounds.get("images_per_s", ()))
    return _figure(result, rates, form, more)


def _fastest(cases: Sequence[Case]) -> Case | None:
    measured = [case for case in cases if case.rounds.get("images_per_s")]
    return max(measured, key=lambda case: case.median("images_per_s") or 0.0, default=None)


def _on_two_cores(result: Result) -> bool:
    """The loader bench on two cores, two threads or workers, files where they are as fast as they can be."""
    slow = any(result.raw.get("settings", {}).get(name) for name in ("latency_ms", "bandwidth_mb", "cold"))
    machine = result.machine.startswith(f"{CORES} CPUs") and "no GPU" in result.machine
    return result.kind == "loader" and machine and result.settings.get("threads") == str(CORES) and not slow


def _loader_ratio(ours: str, base: str, form: str = "{:.2f}x") -> Measure:
    def measure(result: Result) -> Figure | None:
        return _ratio(result, result.case(ours), result.case(base), form) if _on_two_cores(result) else None

    return measure


def _best_peer(result: Result) -> Figure | None:
    best = _fastest([case for case in result.cases if case.peer and case.latency_ms is None])
    return _ratio(result, result.case("cpu"), best, more=f", {best.name}") if best and _on_two_cores(result) else None


def _ingest_of_floor(result: Result) -> Figure | None:
    """One worker, because the standard is per core."""
    one = next((case for case in result.cases if case.name.startswith("1 worker,")), None)
    if result.kind != "ingest" or one is None:
        return None
    films = max(case["films"] for case in result.raw["cases"])
    shares = [taken["floor"]["seconds"] / taken["ingest"]["seconds"] for taken in one.row["rounds"]]
    return _figure(result, shares, "{:.2f}", f", {one.name}", films)


def _ingest_memory(result: Result) -> Figure | None:
    runs = result.raw.get("memory", {}).get("runs") if result.kind == "ingest" else None
    if not runs:
        return None
    sizes = [(run["gigabytes"], run["peak"] / 2**20) for run in runs]
    (small, least), (large, most) = min(sizes), max(sizes)
    shown = f"{most:,.0f} MiB at {large:g} GB of float32, {least:,.0f} MiB at {small:g} GB"
    return Figure(value=max(peak for _, peak in sizes), shown=shown, file=result.file)


def _start(samples: float) -> Measure:
    """Seconds to the first batch of a set of about so many samples."""

    def measure(result: Result) -> Figure | None:
        for row in result.raw["samples"] if result.kind == "scale" else ():
            if "first_batch_s" in row and 0.95 < row["samples"] / samples < 1.05:
                seconds, kept = row["first_batch_s"], row["kept_bytes"] / 1e6
                return Figure(value=seconds, shown=f"{seconds:.2f} s, index {kept:.1f} MB", file=result.file)
        return None

    return measure


def _recipe_cases(result: Result, *names: str) -> list[Case]:
    """The cases of these names of the recipe's step at its batch on the GPU."""
    settings = result.settings
    of_recipe = GPU in result.machine and RECIPE in settings.get("preset", "") and "latency_ms" not in settings
    size = BATCH if settings.get("batch_size", str(BATCH)) == str(BATCH) else 0
    found = [case for case in result.cases if case.name in names and (case.batch_size or size) == BATCH]
    return found if of_recipe else []


def _of_recipe(ours: Sequence[str], theirs: Sequence[str]) -> Measure:
    """Films/s of the fastest of ours to that of the fastest of theirs, within rounds."""
    return lambda result: _ratio(
        result, _fastest(_recipe_cases(result, *ours)), _fastest(_recipe_cases(result, *theirs))
    )


def _waited(result: Result) -> Figure | None:
    live = next(iter(_recipe_cases(result, "live")), None)
    return _figure(result, live.rounds.get("wait_share", ()), "{:.2%}") if live else None


def _recipe(result: Result) -> Figure | None:
    """Minutes of the whole recipe, run or extrapolated."""
    raw = result.raw
    if result.kind != "recipe" or raw["preset"] != RECIPE or GPU not in result.machine:
        return None
    minutes = raw[f"seconds_{RECIPE_STEPS}"] / 60
    how = "run whole" if raw["whole"] else f"from {raw['steps']} steps"
    return Figure(value=minutes, shown=f"{minutes:.1f} minutes, {how}", file=result.file)


_TWO = "loader on 2 cores"
STANDARDS = (
    Standard(f"{_TWO} to hdf5", 6, "{:g}x", _loader_ratio("cpu", "hdf5")),
    Standard(f"{_TWO} to hdf5-tuned", 3, "{:g}x", _loader_ratio("cpu", "hdf5-tuned")),
    Standard(f"{_TWO} to the best peer", 2.5, "{:g}x", _best_peer),
    Standard(f"{_TWO} to its kernels alone", 0.8, "{:g}", _loader_ratio("cpu", "cpu floor", "{:.2f}")),
    Standard(f"{_TWO} from raw shards to hdf5", 10, "{:g}x", _loader_ratio("cpu raw", "hdf5")),
    Standard(f"loader on an {GPU} to the step of {RECIPE}", 5, "{:g}x", _of_recipe(["loader alone"], ["resident"])),
    Standard(f"training on an {GPU} waits for data", 0.01, "{:.0%}", _waited, at_most=True),
    Standard(f"{RECIPE}, {RECIPE_STEPS:,} steps on one {GPU}", 15, "{:g} minutes", _recipe, at_most=True),
    Standard(f"training step on an {GPU} to open_clip's", 1.3, "{:g}x", _of_recipe(*TRAINERS)),
    Standard("ingest to reading and encoding alone, per core", 0.8, "{:g}", _ingest_of_floor),
    Standard("memory of an ingest", 1024, "{:g} MiB", _ingest_memory, at_most=True),
    Standard("first batch of 462,000 samples", 2, "{:g} s", _start(462_000), at_most=True),
    Standard("first batch of 100 million samples", 2, "{:g} s", _start(1e8), at_most=True),
)
"""The table of DESIGN.md, row by row."""
