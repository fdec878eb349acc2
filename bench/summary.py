"""From the rounds of all cases to medians, spread and ratios, each ratio taken within a round; to a table, and to what
the figures mean for whoever tunes a file system."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from bench.case import BASELINE, FLOORS, NOTES, TUNED, Case
from bench.kinds import ratios, speed
from bench.together import IDLE, TUNE

Rounds = list[dict[str, Any]]
"""What `measure.Round` holds, a round each."""
Key = tuple[str, float | None]
"""Name of a case, latency of the file system under it in milliseconds (None: as it is)."""


def summarise(cases: Sequence[Case], rounds: dict[Key, Rounds], notes: dict[Key, str]) -> list[dict[str, Any]]:
    """A dict a case and latency; one that failed or is absent has a note and no figures."""
    peers = {case.name for case in cases if case.peer}
    listed = []
    for (name, latency), taken in rounds.items():
        row: dict[str, Any] = {"name": name} | ({"latency_ms": latency} if latency is not None else {})
        row |= {"peer": True} if name in peers else {}
        note = notes.get((name, latency), NOTES.get(name))
        row |= {"note": note} if note else {}
        if (name, latency) not in notes:
            beside = {key[0]: each for key, each in rounds.items() if key[1] == latency and key not in notes}
            row |= _figures(name, taken, beside, peers)
        listed.append(row)
    return listed


def _figures(name: str, taken: Rounds, beside: dict[str, Rounds], peers: set[str]) -> dict[str, Any]:
    """`beside`: the rounds of all cases at this latency that did not fail."""
    rates = _values(taken, "images_per_s")
    result = speed(rates)
    for field in ("first_batch_s", "cpu_s_per_1000"):
        result[field] = statistics.median(_values(taken, field))
    if sizes := _values(taken, "pss_bytes"):
        result["pss_bytes"] = max(sizes)
    for field in ("read_bytes", "requests", "request_bytes"):
        if field in taken[0]:
            result[f"{field}_per_1000"] = statistics.median(1000 * each[field] / each["images"] for each in taken)
    bases = {"ratio_to_hdf5": BASELINE, "ratio_to_hdf5_tuned": TUNED}
    bases |= {"ratio_to_best_peer": best_peer(beside, peers), "share_of_floor": FLOORS.get(name, "")}
    for field, base in bases.items():
        if beside.get(base):
            found = ratios(rates, _values(beside[base], "images_per_s"))
            result[field] = statistics.median(found)
            result |= {"ratio_lowest": min(found), "ratio_highest": max(found)} if base == BASELINE else {}
    return result | {"rounds": taken}


def best_peer(beside: dict[str, Rounds], peers: set[str]) -> str:
    """The fastest of the loaders of others, by its median; "" where none was measured."""
    measured = [name for name in sorted(peers) if beside.get(name)]
    return max(measured, key=lambda name: statistics.median(_values(beside[name], "images_per_s")), default="")


def _values(taken: Rounds, field: str) -> list[float]:
    return [each[field] for each in taken if field in each]


def verdict(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    """What our fastest loader gives on each file system, whom that keeps waiting, and what to change first."""
    ours = [row for row in rows if "rounds" in row and (row["name"] == "cpu" or row["name"].startswith("dali ("))]
    best: dict[float | None, dict[str, Any]] = {}
    for row in sorted(ours, key=lambda row: row["images_per_s"]):
        best[row.get("latency_ms")] = row
    return " ".join(_sentence(row, settings) for row in sorted(best.values(), key=lambda row: row.get("latency_ms", 0)))


def _sentence(row: dict[str, Any], settings: dict[str, Any]) -> str:
    latency, rate = row.get("latency_ms"), row["images_per_s"]
    said = "" if latency is None else f"At {latency:g} ms a request "
    said += f"{row['name']} gives {rate:,.0f} films/s" + (" from an empty page cache" if settings["cold"] else "")
    if "ratio_to_hdf5" in row:
        several = f" ({row['ratio_lowest']:.1f} to {row['ratio_highest']:.1f})" if len(row["rounds"]) > 1 else ""
        said += f", {row['ratio_to_hdf5']:.1f}x hdf5{several}"
    if settings["cold"] and (start := row["first_batch_s"] * rate / settings["films"]) > _MOST_START:
        return f"{said}; {start:.0%} of the epoch is its start: measure more films to learn of the files."
    busy = rate * row["cpu_s_per_1000"] / 1000
    if row["name"] != "cpu" or busy >= IDLE * settings["threads"]:
        return f"{said}: a step that takes fewer does not wait."
    under = {"latency_ms": latency, "bandwidth_mb": settings.get("bandwidth_mb")}
    flags = [f"--{name.replace('_', '-')} {value:g}" for name, value in under.items() if value]
    tune = TUNE.replace("--tune", " ".join(["--tune", *(["--cold"] if settings["cold"] else []), *flags]))
    waits = f"{busy:.1f} of {settings['threads']} CPUs busy: it waits for files, if nobody else uses them"
    return f"{said}; {waits}; change first: {tune}."


_MOST_START = 0.25
"""Of a cold epoch's time; more, and it says little of the files."""
COLUMNS = {
    "films/s": ("images_per_s", "{:,.0f}"),
    "lowest": ("lowest", "{:,.0f}"),
    "highest": ("highest", "{:,.0f}"),
    "to hdf5": ("ratio_to_hdf5", "{:.2f}x"),
    "to tuned": ("ratio_to_hdf5_tuned", "{:.2f}x"),
    "to peer": ("ratio_to_best_peer", "{:.2f}x"),
    "of floor": ("share_of_floor", "{:.2f}"),
    "CPU s/1000": ("cpu_s_per_1000", "{:.2f}"),
    "PSS MiB": ("pss_bytes", "{:,.0f}"),
    "disk MB/1000": ("read_bytes_per_1000", "{:,.1f}"),
    "reads/1000": ("requests_per_1000", "{:,.1f}"),
    "first batch": ("first_batch_s", "{:.2f} s"),
}
"""Heading -> field and format; columns that no case has are left out."""
_UNITS = {"pss_bytes": 2**20, "read_bytes_per_1000": 1e6}


def table(result: dict[str, Any]) -> list[str]:
    """The results as lines of text."""
    rows = list(result["cases"])
    shown = {head: each for head, each in COLUMNS.items() if any(each[0] in row for row in rows)}
    lines, latency = [_line("loader", list(shown))], None
    for row in rows:
        if row.get("latency_ms", latency) != latency:
            latency = row["latency_ms"]
            lines.append(f"-- {latency:g} ms a request")
        lines.append(_line(row["name"], [_cell(row, *each) for each in shown.values()], row))
    return [*lines, *_profile_lines(result.get("profile", {}))]


def _cell(row: dict[str, Any], field: str, form: str) -> str:
    return form.format(row[field] / _UNITS.get(field, 1)) if field in row else ""


def _line(name: str, cells: list[str], row: dict[str, Any] | None = None) -> str:
    if row is not None and "rounds" not in row:
        return f"{name:<18} {row.get('note', 'not measured')}"
    return f"{name:<18} " + " ".join(f"{cell:>12}" for cell in cells)


def _profile_lines(profile: dict[str, dict[str, float]]) -> Iterator[str]:
    for name, spent in profile.items():
        times = ", ".join(f"{part.removesuffix('_us').replace('_', ' + ')} {us:.0f}" for part, us in spent.items())
        yield f"{name}: CPU microseconds a film: {times}"
