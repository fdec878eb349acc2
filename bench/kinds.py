"""What a JSON of the bench holds, whichever part of it wrote the file: cases measured in rounds, tables, sentences.

Whatever is not as the bench writes it raises some error, on which `shapes.read_results` refuses the file.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

REFERENCES = ("hdf5", "hdf5-tuned", "hdf5 uint8", "hdf5-tuned uint8")
"""Loaders that share no code with ours, beside those of others."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A raw number of a round."""

    title: str
    form: str
    """How a value is written, a format string."""
    higher_is_better: bool
    least: float = 0.0
    """A change smaller than this says nothing, however sure it is."""

    def show(self, value: float | None) -> str:
        """A value as text."""
        return "" if value is None else self.form.format(value)


METRICS = {
    "images_per_s": Metric(title="films/s", form="{:,.0f}", higher_is_better=True),
    "step_ms": Metric(title="step, ms", form="{:,.1f}", higher_is_better=False),
    "wait_share": Metric(title="share waited", form="{:.2%}", higher_is_better=False, least=0.005),
    "cpu_s_per_1000": Metric(title="CPU s a 1,000 films", form="{:.3f}", higher_is_better=False),
    "first_batch_s": Metric(title="first batch, s", form="{:.2f}", higher_is_better=False, least=0.1),
    "pss_mib": Metric(title="memory, MiB", form="{:,.0f}", higher_is_better=False, least=16),
    "read_mib": Metric(title="MiB read a 1,000 films", form="{:,.0f}", higher_is_better=False, least=16),
}
"""Those that are shown and compared, by our name for them."""


_ALIASES = {"step_s": ("step_ms", 1e3), "pss_bytes": ("pss_mib", 2**-20), "read_bytes": ("read_mib", 2**-20)}
"""A writer's name -> ours, and what to multiply by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One thing measured in rounds."""

    name: str
    rounds: dict[str, tuple[float, ...]]
    """A key of METRICS -> one value a round."""
    row: Row = field(default_factory=dict)
    """As the file has it."""
    note: str = ""
    peer: bool = False
    """Somebody else's loader."""
    latency_ms: float | None = None
    """Of a slow file system put under it, which may be 0; None: the file system as it is."""
    batch_size: int | None = None
    """Where the file has cases of several."""

    @property
    def label(self) -> str:
        """What tells it from the others of its file."""
        parts = [self.name]
        parts += [f"batch {self.batch_size}"] if self.batch_size else []
        parts += [f"{self.latency_ms:g} ms"] if self.latency_ms is not None else []
        return ", ".join(parts)

    def median(self, metric: str) -> float | None:
        """Over the rounds; None where it was not measured."""
        return statistics.median(self.rounds[metric]) if self.rounds.get(metric) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of text."""

    title: str = ""
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    """What stands below it, a line each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One run of one part of the bench."""

    file: str
    """Name of the file, with the key of the part where it holds several."""
    kind: str
    """A key of `shapes.KINDS`."""
    raw: Row
    time: str = ""
    """ISO 8601; empty where unknown."""
    machine: str = ""
    """What decides whether two runs compare; empty where unknown."""
    settings: dict[str, str] = field(default_factory=dict)
    cases: tuple[Case, ...] = ()
    tables: tuple[Table, ...] = ()
    said: tuple[str, ...] = ()
    """Verdicts, in words."""

    def case(self, name: str) -> Case | None:
        """The case of a name, on the file system as it is."""
        return next((case for case in self.cases if case.name == name and case.latency_ms is None), None)


def ratios(values: Sequence[float], base: Sequence[float]) -> tuple[float, ...]:
    """Within each round; empty where the rounds are not the same ones."""
    return tuple(value / under for value, under in zip(values, base, strict=True)) if len(values) == len(base) else ()


def speed(rates: Sequence[float]) -> Row:
    """Films/s of a case, as its JSON has them: the median over rounds, and the range."""
    return {"images_per_s": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}


def spread(values: Sequence[float], form: str = "{:.2f}x") -> str:
    """The median, and lowest and highest where there are several."""
    ends = f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else ""
    return form.format(statistics.median(values)) + ends


def machine(environment: Row) -> str:
    """The machine in a line: runs with equal lines compare."""
    if not environment:
        return ""
    size = f", {environment['memory_gib']:.0f} GiB" if "memory_gib" in environment else ""
    disk = environment.get("file_system", {}).get("shards", {}).get("type")
    parts = f"{environment.get('cpus', '?')} CPUs of {environment.get('cpu', '?')}{size}"
    return text(f"{parts}, {environment.get('gpu') or 'no GPU'}{f', {disk}' if disk else ''}")


def text(value: Any) -> str:
    """Anything as one line of printable text."""
    shown = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join("".join(each if each.isprintable() else " " for each in shown).split())


def round_values(rounds: Sequence[Row]) -> dict[str, tuple[float, ...]]:
    """The numbers of METRICS that every round of a list has."""
    found: dict[str, tuple[float, ...]] = {}
    for name in rounds[0] if rounds else ():
        ours, factor = _ALIASES.get(name, (name, 1.0))
        if ours in METRICS and all(row.get(name) is not None for row in rounds):
            each = [1000 / row["images"] if name == "read_bytes" else 1.0 for row in rounds]
            found[ours] = tuple(row[name] * factor * by for row, by in zip(rounds, each, strict=True))
    return found


def measured_cases(raw: Row) -> tuple[Case, ...]:
    """Cases with rounds, as all benches but the ingest's write them."""
    rows: list[Row] = raw["cases"] if "cases" in raw else raw.get("loader", [])
    several = len({row["batch_size"] for row in rows if "batch_size" in row}) > 1
    return tuple(
        Case(
            name=text(row.get("name", "?")),
            rounds=round_values(row.get("rounds", [])),
            row=row,
            note=text(row.get("note") or ""),
            peer=bool(row.get("peer")),
            latency_ms=row.get("latency_ms"),
            batch_size=row.get("batch_size") if several else None,
        )
        for row in rows
    )


def ingest_cases(raw: Row) -> tuple[Case, ...]:
    """An ingest of a layout by so many workers."""
    return tuple(
        Case(
            name=f"{workers(row)}, {text(row['layout'])}, {row['films']:,.0f} films",
            rounds={
                "images_per_s": tuple(row["films"] / taken["ingest"]["seconds"] for taken in row["rounds"]),
                "cpu_s_per_1000": tuple(taken["ingest"]["cpu_s"] / row["films"] * 1e3 for taken in row["rounds"]),
            },
            row=row,
        )
        for row in raw.get("cases", [])
    )


def workers(row: Row) -> str:
    """So many workers, in words."""
    return f"{row['workers']:.0f} worker" + "s" * (row["workers"] != 1)
