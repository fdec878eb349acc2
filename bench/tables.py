"""Tables of what the benches write: the cases of any of them, then what each kind has besides."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from bench.kinds import METRICS, Case, Row, Table, text, workers

Cell = tuple[str, str, str]
"""Key of a row's value, title of its column, format of a number."""


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
