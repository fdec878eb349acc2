"""`python -m bench.report JSON... --html F`: one page of what the bench measured, and what changed.

    files -> results -> standards, comparisons -> sections -> HTML, Markdown

Exit code 0; 1 where a newer run is worse than an older beyond the noise (see `bench.compare` for the rule), for CI;
2 for a mistake.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from bench.compare import BETTER, LEVEL, MACHINE, PACED_LEVEL, RULE, SAME, WORSE, Change, Comparison, compare_all
from bench.kinds import METRICS, Result, Table, text
from bench.page import BAD, GOOD, UNKNOWN, Section, to_html, to_markdown
from bench.processes import bench_guard
from bench.shapes import KINDS, MALFORMED, UnreadableError, bundle, distinct, read_results
from bench.standards import judged
from shards.cli import check_own, parse, say
from shards.errors import InputError

PROG = "python -m bench.report"
TITLE = "shardclip: what the bench measured"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Make one HTML page and Markdown of the bench's JSON files, oldest and newest compared.

    Exit code 1 where a newer run is worse than the one before it beyond the noise.
    """

    files: Positional[tuple[Path, ...]]
    """JSON files of bench.loader, step, together, ingest, encodings, order, scale, demo, tune, gpu, or bundles."""
    html: Path | None = None
    """Where the page goes; it needs no other file and no network."""
    markdown: Path | None = None
    """Where the Markdown goes; without --html and --markdown it is printed."""
    bundle: Path | None = None
    """Where one JSON of all files goes, each verbatim."""
    min_effect: float = 0.05
    """Share of the older median by which a figure has to change to count."""

    def __post_init__(self) -> None:
        if not self.files:
            raise InputError("name one JSON of the bench or more")
        if not 0 <= self.min_effect < 1:
            raise InputError(f"--min-effect {self.min_effect} does not lie in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that the page says."""

    results: list[Result]
    shown: list[Section]
    """What the page shows of each result."""
    read: list[Path]
    """The files that they came from."""
    unreadable: list[str]
    """Files that hold nothing for us, and why."""
    comparisons: list[Comparison]
    not_compared: list[str]
    min_effect: float

    @property
    def regressions(self) -> list[Change]:
        """Of all comparisons."""
        return [change for pair in self.comparisons for change in pair.regressions]


def make_report(files: Sequence[Path], min_effect: float = 0.05) -> Report:
    """Read and compare. InputError where a file is not there, or none holds a result."""
    found: dict[Path, list[Result]] = {}
    unreadable: list[str] = []
    for path in files:
        try:
            found[path] = read_results(path)
        except OSError as error:
            raise InputError(f"cannot read {path} ({error.strerror})") from None
        except UnreadableError as error:
            unreadable.append(f"{text(path.name)}: {error}")
    results, shown = [], []
    for result in distinct(result for each in found.values() for result in each):
        try:
            list(judged([result]))
            shown.append(_result(result))
            results.append(result)
        except MALFORMED as error:
            unreadable.append(f"{result.file}: it is not as the bench writes it ({type(error).__name__})")
    if not results:
        raise InputError(f"none of the files holds a result of the bench: {'; '.join(unreadable)}")
    comparisons, left = compare_all(results, min_effect)
    return Report(
        results=results,
        shown=shown,
        read=list(found),
        unreadable=unreadable,
        comparisons=comparisons,
        not_compared=left,
        min_effect=min_effect,
    )


def sections(report: Report) -> Iterator[Section]:
    """The page from top to bottom: what is to be reached, what changed, then each result."""
    yield _summary(report)
    yield _standards(report)
    yield _changes(report)
    ordered = sorted(zip(report.results, report.shown, strict=True), key=lambda pair: list(KINDS).index(pair[0].kind))
    yield from (section for _, section in ordered)


def _summary(report: Report) -> Section:
    machines = dict.fromkeys(result.machine for result in report.results if result.machine)
    worse = [f"Worse than before: {_in_words(change)}." for change in report.regressions]
    told = (f"{result.file}: {said}" for result in reversed(report.results) for said in result.said)
    return Section(
        title="In short",
        paragraphs=(*worse, *told),
        small=(
            *(f"Measured on {machine}." for machine in machines),
            *(f"Not read: {why}." for why in report.unreadable),
        ),
    )


def _standards(report: Report) -> Section:
    rows = [
        (standard.what, _mark(reached), figure.shown if figure else "", standard.goal, figure.file if figure else "")
        for standard, figure, reached in judged(report.results)
    ]
    table = Table(header=("what", "reached", "measured", "to reach", "file"), rows=tuple(rows))
    note = "The standards of speed of DESIGN.md. Ratios are taken within a round: median (lowest to highest)."
    return Section(title="Standards", small=(note,), tables=(table,))


def _mark(reached: bool | None) -> str:
    return UNKNOWN if reached is None else GOOD if reached else BAD


def _changes(report: Report) -> Section:
    tables = []
    for pair in report.comparisons:
        said = [change for change in pair.changes if change.verdict != SAME]
        rows = [(*_figures(change), change.verdict) for change in (said or pair.changes)]
        title = f"{KINDS[pair.newer.kind].title}: {pair.older.file} ({pair.older.time}) to {pair.newer.file}"
        header = ("case", "figure", "older", "newer", "newer to older", "p", "verdict")
        tables.append(Table(title=title, header=header, rows=tuple(rows)))
    gone = [f"{pair.newer.file} has no case {name!r} any more" for pair in report.comparisons for name in pair.gone]
    nothing = () if report.comparisons else ("No two runs of the same thing on the same machine were given.",)
    kept = "Figures within the noise are left out where others are not." if report.comparisons else ""
    rule = RULE.format(level=LEVEL, paced=PACED_LEVEL, effect=report.min_effect)
    return Section(
        title="Changes",
        paragraphs=nothing,
        small=(*filter(None, (rule, kept)), *gone, *report.not_compared),
        tables=tuple(tables),
    )


def _figures(change: Change) -> tuple[str, ...]:
    metric = METRICS[change.metric]
    shown = (metric.show(change.older), metric.show(change.newer), f"{change.ratio:.2f}x", f"{change.p:.3f}")
    return (change.case, metric.title, *shown)


def _in_words(change: Change) -> str:
    case, what, older, newer, ratio, _ = _figures(change)
    return f"{change.kind} {case}: {what} {older} to {newer} ({ratio})"


def _result(result: Result) -> Section:
    from bench.plots import plots_of

    settings = ", ".join(f"{name} {value}" for name, value in result.settings.items())
    small = [f"{result.file}, {result.time or 'without a time'}, on {result.machine or 'an unknown machine'}."]
    return Section(
        title=f"{KINDS[result.kind].title}: {result.file}",
        paragraphs=result.said,
        small=(*small, *([f"Settings: {settings}."] if settings else [])),
        tables=result.tables,
        plots=plots_of(result),
    )


def main(argv: Sequence[str] | None = None) -> None:
    with bench_guard(PROG):
        config = parse(ReportConfig, argv, prog=PROG)
        from shards.atomic import check_writable, write_atomic

        for path in filter(None, (config.html, config.markdown, config.bundle)):
            check_writable(path)
        if config.bundle:
            check_own(config.bundle, {"bench", "results"}, "--bundle")  # not one of the files that go into it
        report = make_report(config.files, config.min_effect)
        parts = list(sections(report))
        if config.html:
            write_atomic(config.html, to_html(TITLE, parts).encode())
        if config.markdown:
            write_atomic(config.markdown, to_markdown(TITLE, parts).encode())
        if config.bundle:
            write_atomic(config.bundle, bundle(report.read))
        if not (config.html or config.markdown):
            say(to_markdown(TITLE, parts))
        _say_verdict(report)
        if report.regressions:
            raise SystemExit(1)


def _say_verdict(report: Report) -> None:
    """What was not read, and what is worse, on stderr, so that a log shows it where the page went elsewhere."""
    for why in report.unreadable:
        sys.stderr.write(f"{PROG}: not read: {why}\n")
    for change in report.regressions:
        sys.stderr.write(f"{PROG}: worse: {_in_words(change)}\n")
    found = [change.verdict for pair in report.comparisons for change in pair.changes]
    counts = {"result": len(report.results), "pair": len(report.comparisons), "figure": found.count(WORSE)}
    results, pairs, worse = (f"{number} {what}{'s' * (number != 1)}" for what, number in counts.items())
    machine = f", {found.count(MACHINE)} worse as others are too, which is the machine" * (MACHINE in found)
    say(f"{results}, {pairs} compared: {worse} worse, {found.count(BETTER)} better{machine}")


if __name__ == "__main__":
    main()
