"""The JSON kinds of the bench, one `Kind` each: how to know a file, its cases, its tables."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from bench.kinds import Case, Kind, Table, items, mapping, number, ratios, round_values, text

REFERENCES = ("hdf5-tuned", "hdf5")
"""Loaders that share no code with ours: what slows them as well is the machine. The first that is there counts."""

Row = dict[str, Any]
Cell = tuple[str, str, str]
"""Key of a row's value, title of its column, format of a number."""


def loader_cases(raw: Row) -> tuple[tuple[Case, ...], str]:
    """Cases with rounds, as the benches of loader and step write them."""
    rows = [row for row in items(raw.get("cases", raw.get("loader"))) if isinstance(row, dict)]
    sizes = {text(row["batch_size"]) for row in rows if "batch_size" in row}
    cases = [_case(row, several=len(sizes) > 1) for row in rows]
    reference = next((name for name in REFERENCES if any(case.name == name for case in cases)), "")
    return tuple(_paired(case, cases, reference) for case in cases), reference


def _case(row: Row, *, several: bool) -> Case:
    size = number(row.get("batch_size")) if several else None
    return Case(
        name=text(row.get("name", "?")),
        rounds=round_values(row.get("rounds")),
        note=text(row.get("note") or ""),
        peer=bool(row.get("peer")),
        latency_ms=number(row.get("latency_ms")),
        batch_size=None if size is None else int(size),
    )


def _paired(case: Case, cases: list[Case], reference: str) -> Case:
    """With its ratio to the reference that was measured beside it."""
    base = next((each for each in cases if each.name == reference and each.latency_ms == case.latency_ms), None)
    if base is None or case.name == reference:
        return case
    rates, under = case.rounds.get("images_per_s", ()), base.rounds.get("images_per_s", ())
    return replace(case, reference=ratios(rates, under))


def ingest_cases(raw: Row) -> tuple[tuple[Case, ...], str]:
    """An ingest of a layout by so many workers, against reading and encoding alone."""
    return tuple(_ingest_case(row) for row in items(raw.get("cases")) if isinstance(row, dict)), "floor"


def _ingest_case(row: Row) -> Case:
    films = number(row.get("films")) or 0.0
    rows = [mapping(each) for each in items(row.get("rounds"))]
    taken = [mapping(each.get("ingest")) for each in rows]
    seconds = [number(each.get("seconds")) for each in taken]
    floor = [number(mapping(each.get("floor")).get("seconds")) for each in rows]
    values = [{"images_per_s": films / each} for each in seconds if each] if all(seconds) else []
    for value, each in zip(values, taken, strict=False):
        if films and (cpu := number(each.get("cpu_s"))) is not None:
            value["cpu_s_per_1000"] = cpu / films * 1e3
    reference = [base / each for base, each in zip(floor, seconds, strict=True) if base and each]
    return Case(
        name=f"{_workers(row)}, {text(row.get('layout', '?'))}, {films:,.0f} films",
        rounds=round_values(values),
        reference=tuple(reference) if len(reference) == len(rows) else (),
    )


def _workers(row: Row) -> str:
    return f"{text(row.get('workers', '?'))} worker" + "s" * (row.get("workers") != 1)


def no_cases(_: Row) -> tuple[tuple[Case, ...], str]:
    """Nothing in rounds."""
    return (), ""


def cells(form: str, *names: str, **titles: str) -> list[Cell]:
    """Columns of one format: those called as their keys, then key=title."""
    return [*((name, name, form) for name in names), *((key, title, form) for key, title in titles.items())]


def rows_table(title: str, rows: Any, columns: Sequence[Cell]) -> Table:
    """A list of JSON objects as a table; a column that no row has is left out."""
    found = [row for row in items(rows) if isinstance(row, dict)]
    used = [cell for cell in columns if any(row.get(cell[0]) is not None for row in found)]
    body = tuple(tuple(_cell(row.get(key), form) for key, _, form in used) for row in found)
    return Table(title=title, header=tuple(name for _, name, _ in used), rows=body if used else ())


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    counted = number(value)
    return text(value) if counted is None or not form else form.format(counted)


def pairs_table(title: str, values: Any, header: tuple[str, str], form: str = "{:,.4g}") -> Table:
    """A JSON object of plain values as a table of two columns."""
    plain = {name: value for name, value in mapping(values).items() if isinstance(value, str | int | float | bool)}
    return Table(
        title=title, header=header, rows=tuple((text(name), _cell(value, form)) for name, value in plain.items())
    )


def loader_tables(raw: Row) -> Iterator[Table]:
    """Where the time of the CPU loader goes, and whatever each case says besides."""
    for name, spent in mapping(raw.get("profile")).items():
        yield pairs_table(f"{text(name)}: CPU time a film", spent, ("part", "microseconds"), "{:,.1f}")


def ingest_tables(raw: Row) -> Iterator[Table]:
    """Phases, scaling, memory."""
    cases = [row for row in items(raw.get("cases")) if isinstance(row, dict)]
    phases = [
        {"case": f"{_workers(row)}, {text(row.get('layout', '?'))}"}
        | mapping(row.get("phases_s"))
        | {"share": row.get("of_floor_cpu")}
        for row in cases
    ]
    named = cells("{:.2f}", **{name: f"{name}, s" for name in ("start", "encode", "assemble", "finish")})
    share = cells("{:.2f}", share="floor's CPU to its")
    yield rows_table("Phases of the ingest", phases, [*cells("", case="films"), *named, *share])
    workers = [*cells("", layout="films"), *cells("{:.0f}", "from", to="to workers")]
    speeds = cells("{:.2f}", ingest="ingest, x", floor="floor, x")
    yield rows_table("More workers", raw.get("scaling"), [*workers, *speeds])
    memory = [
        {**run, "mib": (number(run.get("peak")) or 0) / 2**20}
        for run in items(mapping(raw.get("memory")).get("runs"))
        if isinstance(run, dict)
    ]
    yield rows_table(
        "Memory of an ingest, all processes together",
        memory,
        cells("{:,.1f}", gigabytes="float32, GB", seconds="s") + cells("{:,.0f}", "films", mib="peak, MiB"),
    )


def encodings_tables(raw: Row) -> Iterator[Table]:
    """Bytes, times and losses of each codec."""
    sizes = [*cells("", name="encoding"), *cells("{:,.0f}", "bytes", tar_bytes="in the tar")]
    times = [*cells("{:.2f}", encode_ms="encode, ms", decode_ms="decode, ms"), *cells("{:.1f}", psnr="dB")]
    columns = [*sizes, *times, *cells("{:.2f}", resized_difference="grey levels at 224")]
    for found in map(mapping, items(raw.get("inputs"))):
        title = text(f"{found.get('name', '?')}: {found.get('films', '?')} films")
        yield rows_table(title, found.get("encodings"), columns)


def order_tables(raw: Row) -> Iterator[Table]:
    """How far the order is from random; older files: start and reads as well."""
    yield pairs_table("How random an epoch is", raw.get("shuffle"), ("figure", "value"))
    yield from scale_tables(raw)


def scale_tables(raw: Row) -> Iterator[Table]:
    """Cost against samples, shards, ranks, threads."""
    times = {"manifest_s": "manifest, s", "order_s": "order, s", "seconds": "s", "first_batch_s": "first batch, s"}
    memory = {"locate_us": "a batch located, us", "kept_bytes": "index, bytes", "peak_bytes": "at most, bytes"}
    counts = cells("{:,.0f}", "samples", "shards", selected="used", blocks="blocks")
    sizes = [*counts, *cells("{:.3f}", **times), *cells("{:,.0f}", **memory)]
    yield rows_table("Start", raw.get("start"), sizes)
    yield rows_table("More samples", raw.get("samples"), sizes)
    yield rows_table("More shards, the same samples", raw.get("shards"), sizes)
    reads = cells("{:,.0f}", "ranks", reads="block reads an epoch", bound="at most")
    spent = [*cells("{:.3f}", ratio="reads a block"), *cells("{:,.0f}", plan_us="a visit planned, us")]
    yield rows_table("More ranks", raw.get("ranks", raw.get("reads")), [*reads, *spent])


def demo_tables(raw: Row) -> Iterator[Table]:
    """Seconds of the commands, AUROC of the labels."""
    yield pairs_table("Time of each command", raw.get("seconds"), ("command", "s"), "{:,.1f}")
    labels = mapping(mapping(raw.get("evaluation")).get("labels"))
    rows = [{"label": name, **mapping(found)} for name, found in labels.items()]
    columns = [*cells("", "label"), *cells("{:.3f}", auroc="AUROC"), *cells("{:.0f}", positives="films with it")]
    yield rows_table("Zero-shot, test split", rows, columns)


def nih_tables(raw: Row) -> Iterator[Table]:
    """AUROC of the labels, beside what they are measured against."""
    rows = [{"label": name, **mapping(found)} for name, found in mapping(raw.get("test")).items()]
    names = ("model", "thumbnails", "untrained_0", "view_ap", "model_among_abnormal")
    yield rows_table("AUROC, test split", rows, [*cells("", "label"), *cells("{:.3f}", *names)])


def controls_tables(raw: Row) -> Iterator[Table]:
    """AUROC of the model and of what must not be as good."""
    found = {name: mapping(each) for name, each in mapping(raw.get("auroc")).items()}
    labels = dict.fromkeys(label for each in found.values() for label in each)
    rows = [{"label": label} | {name: each.get(label) for name, each in found.items()} for label in labels]
    yield rows_table("AUROC", rows, [("label", "label", ""), *((name, text(name), "{:.3f}") for name in found)])


def tune_tables(raw: Row) -> Iterator[Table]:
    """What was tried, and what each choice bought."""
    bought = cells("{:.3f}", ratio="x as fast", lowest="lowest", highest="highest")
    columns = [*cells("", "setting", "default", "chosen"), *bought, *cells("", "kept")]
    yield rows_table("What each choice bought", raw.get("choices"), columns)


def recipe_tables(raw: Row) -> Iterator[Table]:
    """What a run of the recipe took."""
    yield pairs_table("The recipe", raw, ("figure", "value"))


def gpu_test_tables(raw: Row) -> Iterator[Table]:
    """The tests that need a GPU."""
    lines = [*items(raw.get("summary")), *items(raw.get("not_passed"))]
    yield Table(title="", header=("said",), rows=tuple((text(line),) for line in lines))


def failed_tables(raw: Row) -> Iterator[Table]:
    """A part of `make gpu`, or the training beside the loaders, that could not be measured."""
    yield Table(title="", header=("failed",), rows=((text(raw.get("failed")),),))


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda raw: all(name in raw for name in names)


def _has_rates(raw: Row) -> bool:
    """Cases with films/s, as the loader bench wrote them from the beginning."""
    return any("images_per_s" in mapping(case) for case in items(raw.get("cases")))


def _has_floor(raw: Row) -> bool:
    """An ingest against its floor, or its memory."""
    cases = items(raw.get("cases"))
    return "runs" in mapping(raw.get("memory")) or any("of_floor" in mapping(case) for case in cases)


KINDS = {
    "loader": Kind(title="Loader", fits=_has_rates, cases=loader_cases, tables=loader_tables),
    "step": Kind(title="Training step", fits=lambda _: False, cases=loader_cases, tables=loader_tables),
    "together": Kind(title="Loader and step together", fits=lambda _: False, cases=loader_cases, tables=loader_tables),
    "tune": Kind(title="Tuned loader", fits=lambda _: False, cases=loader_cases, tables=tune_tables),
    "scale": Kind(title="Scale", fits=_has("samples", "ranks"), cases=loader_cases, tables=scale_tables),
    "ingest": Kind(title="Ingest", fits=_has_floor, cases=ingest_cases, tables=ingest_tables),
    "encodings": Kind(title="Encodings", fits=_has("inputs"), cases=no_cases, tables=encodings_tables),
    "order": Kind(title="Order of samples", fits=_has("shuffle"), cases=no_cases, tables=order_tables),
    "recipe": Kind(title="Recipe", fits=_has("whole", "steps", "wall_s"), cases=no_cases, tables=recipe_tables),
    "gpu tests": Kind(
        title="Tests on the GPU", fits=_has("exit_code", "summary"), cases=no_cases, tables=gpu_test_tables
    ),
    "failed": Kind(title="Not measured", fits=_has("failed"), cases=no_cases, tables=failed_tables),
    "demo": Kind(title="Demo", fits=_has("evaluation", "loader"), cases=loader_cases, tables=demo_tables),
    "nih": Kind(title="NIH films", fits=_has("test", "bootstrap"), cases=no_cases, tables=nih_tables),
    "controls": Kind(title="Controls", fits=_has("auroc", "passed"), cases=no_cases, tables=controls_tables),
}
"""Name -> how its JSON looks. Order matters where files say nothing of their kind: the first that fits."""
