"""Files of the bench to results, and results to one file.

    bytes -> JSON -> its kind (the key "bench", or the shape of older files) -> Result

Files that hold others (a bundle, what `make gpu` writes) give a Result for each.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.kinds import MAX_SAID, Result, machine, mapping, text
from bench.shapes import KINDS

BUNDLE = "bundle"
"""A file of files, each verbatim under its name."""
MAX_BYTES, MAX_NESTED = 64 << 20, 4
"""No file of ours comes near: its bytes, results within results."""


class UnreadableError(ValueError):
    """A file that is no JSON of the bench; says why."""


def read_results(path: Path) -> list[Result]:
    """All results in a file. UnreadableError for what holds none; OSError where it cannot be read at all."""
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UnreadableError(f"it is larger than {MAX_BYTES >> 20} MiB")
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"it is not JSON ({type(error).__name__})") from None
    found = list(_results(path.name, raw, {}, MAX_NESTED))
    if not found:
        raise UnreadableError("it is JSON, but of no kind that the bench writes")
    return found


def _results(file: str, raw: Any, environment: Mapping[str, Any], depth: int) -> Iterator[Result]:
    if not isinstance(raw, dict):
        return
    environment = mapping(raw.get("environment")) or environment
    kind = _kind(raw)
    if kind is not None:
        result = _result(file, kind, raw, environment)
        if result.cases or result.tables:
            yield result
        for name, value in mapping(raw.get("together")).items() if depth else ():
            yield from _results(f"{file}: {text(name)}", value, environment, depth - 1)
    elif depth:
        inside = raw.get("results") if raw.get("bench") == BUNDLE else raw
        for name, value in mapping(inside).items():
            inner = text(name) if inside is not raw else f"{file}: {text(name)}"
            yield from _results(inner, value, environment, depth - 1)


def _kind(raw: dict[str, Any]) -> str | None:
    if "bench" in raw:
        name = str(raw["bench"])[:40]
        return name if name in KINDS else None
    return next((name for name, kind in KINDS.items() if kind.fits(raw)), None)


def _result(file: str, kind: str, raw: dict[str, Any], environment: Mapping[str, Any]) -> Result:
    shape = KINDS[kind]
    cases, reference = shape.cases(raw)
    settings = mapping(raw.get("settings")) or mapping(raw.get("config"))
    said = raw.get("verdict", raw.get("failed"))
    return Result(
        file=text(file),
        kind=kind,
        raw=raw,
        time=text(environment.get("time", "")),
        machine=machine(environment),
        settings={text(name): text(value) for name, value in settings.items()},
        cases=cases,
        reference=reference,
        tables=tuple(table for table in shape.tables(raw) if table.rows),
        said=tuple(text(each, MAX_SAID) for each in (said if isinstance(said, list) else [said]) if each),
    )


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
        found |= mapping(raw.get("results")) if raw.get("bench") == BUNDLE else {path.name: raw}
    return (json.dumps({"bench": BUNDLE, "results": found}, indent=1) + "\n").encode()
