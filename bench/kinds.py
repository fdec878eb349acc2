"""What a JSON of the bench holds, whichever part of it wrote the file: cases measured in rounds, tables, sentences.

A file may come from anywhere: what is not of the shape that is looked for is left out, never believed.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_ITEMS, MAX_TEXT, MAX_SAID = 2_000, 400, 1_500
"""No file of ours comes near: cases or rows of a table, characters of a text, of a verdict."""


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
    "read_mib": Metric(title="read from storage, MiB", form="{:,.0f}", higher_is_better=False, least=16),
}
"""Those that are shown and compared, by our name for them."""

_ALIASES: dict[str, tuple[str, float]] = {
    "step_s": ("step_ms", 1e3),
    "pss_bytes": ("pss_mib", 2**-20),
    "read_bytes": ("read_mib", 2**-20),
    "cpu_s_per_1000_images": ("cpu_s_per_1000", 1.0),
}
"""A writer's name -> ours, and what to multiply by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One thing measured in rounds."""

    name: str
    rounds: dict[str, tuple[float, ...]]
    """A key of METRICS -> one value a round."""
    reference: tuple[float, ...] = ()
    """Its films/s to those of the result's reference, within each round."""
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

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One run of one part of the bench."""

    file: str
    """Name of the file, with the key of the part where it holds several."""
    kind: str
    """A key of KINDS."""
    raw: Mapping[str, Any]
    time: str = ""
    """ISO 8601; empty where unknown."""
    machine: str = ""
    """What decides whether two runs compare; empty where unknown."""
    settings: dict[str, str] = field(default_factory=dict)
    cases: tuple[Case, ...] = ()
    reference: str = ""
    """What `Case.reference` is relative to."""
    tables: tuple[Table, ...] = ()
    said: tuple[str, ...] = ()
    """Verdicts, in words."""

    def case(self, name: str) -> Case | None:
        """The case of a name, on the file system as it is."""
        return next((case for case in self.cases if case.name == name and case.latency_ms is None), None)


def machine(environment: Mapping[str, Any]) -> str:
    """The machine in a line: runs with equal lines compare."""
    if not environment:
        return ""
    memory = number(environment.get("memory_gib"))
    gpu = text(environment.get("gpu") or "no GPU")
    size = "" if memory is None else f", {memory:.0f} GiB"
    disk = text(mapping(mapping(environment.get("file_system")).get("shards")).get("type", ""))
    shown = f"{text(environment.get('cpus', '?'))} CPUs of {text(environment.get('cpu', '?'))}{size}, {gpu}"
    return f"{shown}, {disk}" if disk else shown


def round_values(rounds: Any) -> dict[str, tuple[float, ...]]:
    """The numbers of METRICS that every round of a list has."""
    rows = [row for row in items(rounds) if isinstance(row, dict)]
    found: dict[str, tuple[float, ...]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        ours, factor = _ALIASES.get(name, (name, 1.0))
        values = [number(row.get(name)) for row in rows]
        if ours in METRICS and all(value is not None for value in values):
            found[ours] = tuple(value * factor for value in values if value is not None)
    return found


def ratios(values: tuple[float, ...], base: tuple[float, ...]) -> tuple[float, ...]:
    """Within each round; empty where the rounds are not the same ones."""
    if len(values) != len(base) or not all(base):
        return ()
    return tuple(value / under for value, under in zip(values, base, strict=True))


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def text(value: Any, most: int = MAX_TEXT) -> str:
    """Anything as one line of printable text, cut where it is long."""
    if isinstance(value, float):
        value = f"{value:.6g}"
    shown = "".join(each if each.isprintable() else " " for each in str(value)[: 2 * most])
    shown = " ".join(shown.split())
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def mapping(value: Any) -> dict[str, Any]:
    """A JSON object, or an empty one; what is beyond MAX_ITEMS is dropped."""
    return dict(list(value.items())[:MAX_ITEMS]) if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """A JSON array, or an empty one; what is beyond MAX_ITEMS is dropped."""
    return value[:MAX_ITEMS] if isinstance(value, list) else []


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """How one part of the bench writes its JSON."""

    title: str
    fits: Callable[[dict[str, Any]], bool]
    """Whether a file without the key "bench" is one."""
    cases: Callable[[dict[str, Any]], tuple[tuple[Case, ...], str]]
    """Its cases, and the reference's name."""
    tables: Callable[[dict[str, Any]], Iterator[Table]]
