"""Files of the bench to results, and results to one file.

    bytes -> JSON -> its kind (the key "bench", or the shape of older files) -> cases, tables -> Result

Files that hold others (a bundle, what `make gpu` writes) give a Result for each. A file that is not as its kind has it
is refused whole.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import tables
from bench.kinds import Case, Result, Row, Table, ingest_cases, machine, measured_cases, text
from shards.atomic import encode_json

BUNDLE = "bundle"
"""A file of files, each verbatim under its name."""
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
    content = path.read_bytes()
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"it is not JSON ({type(error).__name__})") from None
    try:
        found = list(_results(path.name, raw, {}))
    except MALFORMED as error:
        raise UnreadableError(f"it is not as the bench writes it ({type(error).__name__})") from None
    if not found:
        raise UnreadableError("it is JSON, but of no kind that the bench writes")
    return found


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
        tables=tuple(table for table in (tables.cases_table(cases), *KINDS[kind].tables(raw)) if table.rows),
        said=(text(said),) if said else (),
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
    return encode_json({"bench": BUNDLE, "results": found})


KINDS = {
    "loader": Kind(title="Loader", cases=measured_cases, tables=tables.loader_tables),
    "step": Kind(title="Training step", cases=measured_cases),
    "together": Kind(title="Loader and step together", cases=measured_cases),
    "tune": Kind(title="Tuned loader", cases=measured_cases, tables=tables.tune_tables),
    "scale": Kind(title="Scale", cases=measured_cases, tables=tables.scale_tables),
    "ingest": Kind(title="Ingest", keys=("scaling", "memory"), cases=ingest_cases, tables=tables.ingest_tables),
    "encodings": Kind(title="Encodings", keys=("inputs",), tables=tables.encodings_tables),
    "recipe": Kind(title="Recipe", keys=("wall_s",), tables=lambda raw: iter([tables.pairs_table("The recipe", raw)])),
    "gpu tests": Kind(title="Tests on the GPU", keys=("exit_code",), tables=tables.said_tables),
    "failed": Kind(title="Not measured", keys=("failed",), tables=tables.said_tables),
    "demo": Kind(title="Demo", keys=("evaluation",), cases=measured_cases, tables=tables.demo_tables),
    "nih": Kind(title="NIH films", keys=("bootstrap",), tables=tables.nih_tables),
    "controls": Kind(title="Controls", keys=("passed",), tables=tables.controls_tables),
}
"""Name -> how its JSON looks."""
