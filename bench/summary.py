"""From the rounds of all cases to medians, spread and ratios, each ratio taken within a round; to what the figures
mean for whoever tunes a file system."""

import statistics
from collections.abc import Sequence
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
