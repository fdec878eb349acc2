"""Files of the bench to results, and results to one file.

    bytes -> JSON -> its kind (the key "bench", or the shape of older files) -> cases, tables -> Result

Files that hold others (a bundle, what `make gpu` writes) give a Result for each. A file that is not as its kind has it
is refused whole.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.kinds import METRICS, Case, Result, Row, Table, ingest_cases, machine, measured_cases, text, workers

BUNDLE = "bundle"
"""A file of files, each verbatim under its name."""
MAX_BYTES, MAX_SAID = 64 << 20, 1_500
"""No file of ours comes near: its bytes, characters of a verdict."""

Cell = tuple[str, str, str]
"""Key of a row's value, title of its column, format of a number."""
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)
"""What a JSON that is not as the bench writes it gives rise to."""


class UnreadableError(ValueError):
    """A file that is no JSON of the bench; says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """How one part of the bench writes its JSON."""

    title: str
    keys: tuple[str, ...] = ()
    """One of them is in a file of it that says nothing of its kind."""
    cases: Callable[[Row], tuple[Case, ...]] = lambda _: ()
    tables: Callable[[Row], Iterator[Table]] = lambda _: iter(())


def read_results(path: Path) -> list[Result]:
    """All results in a file. UnreadableError for what holds none; OSError where it cannot be read at all."""
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UnreadableError(f"it is larger than {MAX_BYTES >> 20} MiB")
    try:
        raw = json.loads(content, parse_float=_finite, parse_int=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"it is not JSON of finite numbers ({type(error).__name__})") from None
    try:
        found = list(_results(path.name, raw, {}))
    except MALFORMED as error:
        raise UnreadableError(f"it is not as the bench writes it ({type(error).__name__})") from None
    if not found:
        raise UnreadableError("it is JSON, but of no kind that the bench writes")
    return found


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(digits)
    return value if {*digits} & {*".eE"} else int(digits)


def _results(file: str, raw: Any, environment: Row) -> Iterator[Result]:
    if not isinstance(raw, dict):
        return
    environment = raw.get("environment") or environment
    kind = _kind(raw)
    if kind is not None:
        result = _result(file, kind, raw, environment)
        if result.cases or result.tables:
            yield result
        for name, value in (raw.get("together") or {}).items():
            yield from _results(f"{file}: {text(name)}", value, environment)
        return
    bundled = raw.get("bench") == BUNDLE
    for name, value in (raw["results"] if bundled else raw).items():
        yield from _results(text(name) if bundled else f"{file}: {text(name)}", value, environment)


def _kind(raw: Row) -> str | None:
    said = [raw["bench"]] if "bench" in raw else [name for name, kind in KINDS.items() if raw.keys() & set(kind.keys)]
    return next((name for name in said if name in KINDS), None)


def _result(file: str, kind: str, raw: Row, environment: Row) -> Result:
    cases = KINDS[kind].cases(raw)
    said = raw.get("verdict", raw.get("failed"))
    return Result(
        file=text(file),
        kind=kind,
        raw=raw,
        time=text(environment.get("time", "")),
        machine=machine(environment),
        settings={text(name): text(value) for name, value in raw.get("settings", {}).items()},
        cases=cases,
        tables=tuple(table for table in (cases_table(cases), *KINDS[kind].tables(raw)) if table.rows),
        said=(text(said, MAX_SAID),) if said else (),
    )


def tables_of(raw: Row) -> Iterator[Table]:
    """Those of what a bench is about to write."""
    return (table for result in _results("", raw, {}) for table in result.tables)


def distinct(results: Iterable[Result]) -> list[Result]:
    """Each content once, under its first name, the oldest first; those without a time before all others."""
    found: dict[str, Result] = {}
    for result in results:
        found.setdefault(json.dumps([result.raw, result.time], sort_keys=True), result)
    return sorted(found.values(), key=lambda result: (result.time, result.file))


def bundle(paths: Iterable[Path]) -> bytes:
    """One file of several that were read, each as it is; bundles among them are opened."""
    found: dict[str, Any] = {}
    for path in paths:
        raw = json.loads(path.read_bytes())
        found |= raw["results"] if raw.get("bench") == BUNDLE else {path.name: raw}
    return (json.dumps({"bench": BUNDLE, "results": found}, indent=1) + "\n").encode()


def cells(form: str, *names: str, **titles: str) -> list[Cell]:
    """Columns of one format: those called as their keys, then key=title."""
    return [*((name, name, form) for name in names), *((key, title, form) for key, title in titles.items())]


def rows_table(title: str, rows: Sequence[Row], columns: Sequence[Cell]) -> Table:
    """A list of JSON objects as a table; a column that no row has is left out."""
    used = [cell for cell in columns if any(row.get(cell[0]) is not None for row in rows)]
    body = tuple(tuple(_cell(row.get(key), form) for key, _, form in used) for row in rows)
    return Table(title=title, header=tuple(name for _, name, _ in used), rows=body if used else ())


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return form.format(value) if form else text(value)


SHOWN = [
    *cells("{:.2f}x", ratio_to_hdf5="to hdf5", ratio_to_hdf5_tuned="to hdf5-tuned", ratio_to_best_peer="to best peer"),
    *[*cells("{:.2f}x", ratio_to_open_clip="to open_clip"), *cells("", ratios="range of it")],
    *cells("{:.2f}", share_of_floor="of its kernels", of_floor="of floor", of_floor_cpu="floor's CPU to its"),
    *cells("{:,.1f}", requests_per_1000="requests a 1,000", host_ms="launch, ms", gflop="GFLOP"),
    *[*cells("{:.1%}", mfu="of peak", idle_share="GPU idle"), *cells("{:,.0f}", mib="GPU memory, MiB")],
]
"""Columns of a table of cases, beside METRICS: what the benches have worked out of rounds."""
_NONE: Cell = ("", "", "")


def cases_table(cases: Sequence[Case]) -> Table:
    """Medians of all cases, with the range of what matters most; notes below."""
    main, *others = [name for name in METRICS if any(case.rounds.get(name) for case in cases)] or [""]
    rows = [
        {
            **{key: case.row.get(key) for key, _, _ in SHOWN},
            **{name: case.median(name) for name in METRICS},
            "case": case.label,
            "range": _range(case.rounds.get(main, ()), METRICS[main].form if main else ""),
            "ratios": _range([case.row[end] for end in ("ratio_lowest", "ratio_highest") if end in case.row], "{:.2f}"),
            "gflop": _scaled(case.row.get("flops_per_step"), 1e9),
            "mib": _scaled(case.row.get("memory_bytes"), 2**20),
            "rounds": max(map(len, case.rounds.values()), default=None),
        }
        for case in cases
    ]
    first, *rest = [(name, METRICS[name].title, METRICS[name].form) for name in (main, *others) if name] or [_NONE]
    table = rows_table(
        "Medians over the rounds",
        rows,
        [*cells("", "case"), first, *cells("", "range"), *rest, *SHOWN, *cells("", "rounds")],
    )
    return replace(table, notes=tuple(dict.fromkeys(f"{case.name}: {case.note}" for case in cases if case.note)))


def _range(values: Sequence[float], form: str) -> str | None:
    return f"{form.format(min(values))} to {form.format(max(values))}" if len(values) > 1 else None


def _scaled(value: float | None, by: float) -> float | None:
    return None if value is None else value / by


def pairs_table(title: str, values: Row, header: tuple[str, str] = ("figure", "value"), form: str = "{:,.4g}") -> Table:
    """A JSON object's plain values as a table of two columns."""
    plain = {name: value for name, value in values.items() if isinstance(value, str | int | float)}
    rows = ((text(name), _cell(value, form if type(value) in (int, float) else "")) for name, value in plain.items())
    return Table(title=title, header=header, rows=tuple(rows))


def loader_tables(raw: Row) -> Iterator[Table]:
    """Where the time of the CPU loader goes."""
    for name, spent in raw.get("profile", {}).items():
        parts = {part.removesuffix("_us").replace("_", " + "): us for part, us in spent.items()}
        yield pairs_table(f"{text(name)}: CPU time a film", parts, ("part", "microseconds"), "{:,.1f}")


def ingest_tables(raw: Row) -> Iterator[Table]:
    """Phases, scaling, memory."""
    phases = [{"case": f"{workers(row)}, {text(row['layout'])}", **row["phases_s"]} for row in raw.get("cases", [])]
    named = cells("{:.2f}", **{name: f"{name}, s" for name in ("start", "encode", "assemble", "finish")})
    yield rows_table("Phases of the ingest", phases, [*cells("", case="films"), *named])
    scaled = [*cells("", layout="films"), *cells("{:.0f}", "from", to="to workers")]
    speeds = cells("{:.2f}", ingest="ingest, x", floor="floor, x")
    yield rows_table("More workers", raw.get("scaling", []), [*scaled, *speeds])
    found = raw.get("memory", {})
    memory = [
        run | {name: size / 2**20 for name, size in zip(("all", "first", "worker"), _sizes(run), strict=True)}
        for run in found.get("runs", [])
    ]
    columns = cells("{:,.1f}", gigabytes="float32, GB", seconds="s") + cells("{:,.0f}", "films")
    parts = cells("{:,.0f}", all="peak, MiB", first="of the parent", worker="of the largest worker")
    yield rows_table("Memory of an ingest, all processes together", memory, [*columns, *parts])
    slopes = {name.replace("_", " "): found[name] for name in ("bytes_a_film", "parent_bytes_a_film") if name in found}
    yield pairs_table("A straight line through them", slopes, ("slope", "bytes"), "{:,.0f}")


def _sizes(run: Row) -> tuple[float, float, float]:
    """Bytes of all processes, of the parent and of the largest worker."""
    return run["peak"], run["parent"], max(run["children"], default=0)


def encodings_tables(raw: Row) -> Iterator[Table]:
    """Bytes, times and losses of each codec."""
    sizes = [*cells("", name="encoding"), *cells("{:,.0f}", "bytes", tar_bytes="in the tar")]
    times = [*cells("{:.2f}", encode_ms="encode, ms", decode_ms="decode, ms"), *cells("{:.1f}", psnr="dB")]
    lost = cells("{:.2f}", resized_difference="grey levels at 224", resized_difference_worst="worst film")
    columns = [*sizes, *times, *cells("{:.1f}", resized_psnr="dB at 224"), *lost]
    for found in raw["inputs"]:
        yield rows_table(text(f"{found['name']}: {found['films']} films"), found["encodings"], columns)


def scale_tables(raw: Row) -> Iterator[Table]:
    """How far the order is from random; cost against samples, shards, ranks, threads."""
    yield pairs_table("How random an epoch is", raw.get("shuffle", {}))
    times = {"manifest_s": "manifest, s", "order_s": "order, s", "seconds": "s", "first_batch_s": "first batch, s"}
    memory = {"locate_us": "a batch located, us", "kept_bytes": "index, bytes", "peak_bytes": "at most, bytes"}
    counts = cells("{:,.0f}", "samples", "shards", selected="used", blocks="blocks")
    sizes = [*counts, *cells("{:.3f}", **times), *cells("{:,.0f}", **memory)]
    yield rows_table("Start", raw.get("start", []), sizes)
    yield rows_table("More samples", raw.get("samples", []), sizes)
    yield rows_table("More shards, the same samples", raw.get("shards", []), sizes)
    reads = cells("{:,.0f}", "ranks", reads="block reads an epoch", bound="at most")
    spent = [*cells("{:.3f}", ratio="reads a block"), *cells("{:,.0f}", plan_us="a visit planned, us")]
    yield rows_table("More ranks", raw["ranks"] if "ranks" in raw else raw.get("reads", []), [*reads, *spent])


def demo_tables(raw: Row) -> Iterator[Table]:
    """Seconds of the commands, AUROC of the labels."""
    yield pairs_table("Time of each command", raw["seconds"], ("command", "s"), "{:,.1f}")
    rows = [{"label": name, **found} for name, found in raw["evaluation"]["labels"].items()]
    columns = [*cells("", "label"), *cells("{:.3f}", auroc="AUROC"), *cells("{:.0f}", positives="films with it")]
    yield rows_table("Zero-shot, test split", rows, columns)


def nih_tables(raw: Row) -> Iterator[Table]:
    """AUROC of the labels, beside what they are measured against."""
    shown = ("model", "thumbnails", "untrained_0", "view_ap", "model_among_abnormal")
    rows = [
        {"label": name, **found, "ends": _range(found.get("interval") or (), "{:.3f}")}
        for name, found in raw["test"].items()
    ]
    counts = cells("{:.0f}", "films", "patients")
    columns = [*cells("", "label"), *cells("{:.3f}", *shown), *cells("", ends="95 % of model"), *counts]
    yield rows_table("AUROC, test split", rows, columns)


def controls_tables(raw: Row) -> Iterator[Table]:
    """AUROC of the model and of what must not be as good."""
    labels = dict.fromkeys(label for each in raw["auroc"].values() for label in each)
    rows = [{"label": label, **{name: each.get(label) for name, each in raw["auroc"].items()}} for label in labels]
    yield rows_table("AUROC", rows, [("label", "label", ""), *((name, text(name), "{:.3f}") for name in raw["auroc"])])


def tune_tables(raw: Row) -> Iterator[Table]:
    """What each choice bought."""
    rows = [row | {"so": _kept(row, raw["chosen"])} for row in raw["choices"]]
    bought = cells("{:.2f}", ratio="x as fast", lowest="lowest", highest="highest")
    columns = [*cells("", "setting", "default", chosen="tried"), *bought, *cells("", so="verdict")]
    yield rows_table("What each choice bought", rows, columns)


def _kept(row: Row, chosen: Row) -> str:
    """Where each round was faster and it was not kept, they are too few or too far apart: that is no answer yet."""
    if row["kept"] and row["setting"] in chosen:
        return "kept"
    return f"not kept: {'perhaps noise; give more --minutes' if row['lowest'] > 1 else 'no more than the noise'}"


def said_tables(raw: Row) -> Iterator[Table]:
    """What the tests that need a GPU said; why a part of `make gpu`, or the training beside the loaders, failed."""
    lines = [*raw.get("summary", []), *raw.get("not_passed", []), *filter(None, [raw.get("failed")])]
    yield Table(header=("said",), rows=tuple((text(line),) for line in lines))


KINDS = {
    "loader": Kind(title="Loader", cases=measured_cases, tables=loader_tables),
    "step": Kind(title="Training step", cases=measured_cases),
    "together": Kind(title="Loader and step together", cases=measured_cases),
    "tune": Kind(title="Tuned loader", cases=measured_cases, tables=tune_tables),
    "scale": Kind(title="Scale", cases=measured_cases, tables=scale_tables),
    "ingest": Kind(title="Ingest", keys=("scaling", "memory"), cases=ingest_cases, tables=ingest_tables),
    "encodings": Kind(title="Encodings", keys=("inputs",), tables=encodings_tables),
    "order": Kind(title="Order of samples", keys=("shuffle",), tables=scale_tables),
    "recipe": Kind(title="Recipe", keys=("wall_s",), tables=lambda raw: iter([pairs_table("The recipe", raw)])),
    "gpu tests": Kind(title="Tests on the GPU", keys=("exit_code",), tables=said_tables),
    "failed": Kind(title="Not measured", keys=("failed",), tables=said_tables),
    "demo": Kind(title="Demo", keys=("evaluation",), cases=measured_cases, tables=demo_tables),
    "nih": Kind(title="NIH films", keys=("bootstrap",), tables=nih_tables),
    "controls": Kind(title="Controls", keys=("passed",), tables=controls_tables),
}
"""Name -> how its JSON looks."""
