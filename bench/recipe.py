"""How long a recipe takes: its first steps through train.main, and from them all of it; or all of it, if asked."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards.manifest import read_manifest
from shards.schema import Manifest

_WARM = 0.2
"""Share of the rows that are left out of the time of a step: compiling, first use of kernels, caches."""


def run_recipe(
    run: Callable[[list[Any]], None], name: str, shards: Path, out: Path, *, steps: int | None, options: list[Any]
) -> dict[str, Any]:
    """Train so many steps of a preset (None: all) from weights drawn by chance, which takes as long, with `options` of
    train.main, by `run`; and say what the whole recipe takes."""
    from train.commandline import preset

    whole, manifest = preset(name), read_manifest(shards)
    began = time.perf_counter()
    run(_command(name, manifest, shards, out, steps, options))
    wall_s = time.perf_counter() - began
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found: dict[str, Any] = {
        "preset": name,
        "whole": steps is None,
        "steps": rows[-1]["step"],
        "wall_s": wall_s,
        "train_rows": manifest.rows("train"),
        "val_rows": manifest.rows("val"),
        **pace(rows),
    }
    validations = whole.steps // whole.validate_every if whole.validate_every else 0
    validated = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    losses = {"first": rows[0]["loss"], "last": rows[-1]["loss"], "validation": validated[-1] if validated else None}
    return {**found, f"seconds_{whole.steps}": total_seconds(found, whole.steps, validations), "losses": losses}


def _command(
    name: str, manifest: Manifest, shards: Path, out: Path, steps: int | None, options: list[Any]
) -> list[Any]:
    command = ["train.main", "--preset", name, *options, "--shards", shards, "--out", out]
    command += ["--vision-weights", "none", "--text-weights", "none"]
    if steps is not None:
        # Two saves, so that the rows after the first say how long it held training up.
        half = max(1, steps // 2)
        command += ["--stop-at", steps, "--save-every", half, "--log-every", max(1, min(10, half // 5))]
        command += ["--validate-every", steps if manifest.rows("val") else 0]
    return command


def pace(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of a step, of a validation and that a save holds training up; the share that waited for the loader."""
    steady = rows[int(len(rows) * _WARM) :]
    step_s = statistics.mean(row["step_ms"] for row in steady) / 1e3
    wait_s = statistics.mean(row["loader_wait_ms"] for row in steady) / 1e3
    validate = [row["validate_s"] for row in rows if row.get("validate_s") is not None]
    paused = [row["save_pause_s"] for row in rows if row.get("save_pause_s") is not None]
    every = rows[1]["step"] - rows[0]["step"] if len(rows) > 1 else rows[0]["step"]
    slow = sum(max(0.0, row["step_ms"] / 1e3 - step_s) for row in rows[: int(len(rows) * _WARM)]) * every
    return {
        "step_s": step_s,
        "wait_share": wait_s / step_s,
        "warm_up_s": slow,
        "validate_s": statistics.median(validate) if validate else None,
        "save_pause_s": statistics.median(paused) if paused else None,
    }


def total_seconds(found: dict[str, Any], steps: int, rounds: int) -> float:
    """Of a whole recipe: measured where it was run whole, else its steps and `rounds` validations with their saves."""
    if found["whole"]:
        return found["wall_s"]
    each = (found["validate_s"] or 0.0) + (found["save_pause_s"] or 0.0)
    return found["warm_up_s"] + steps * found["step_s"] + rounds * each
