"""How long a recipe takes: its first steps through train.main, and from them all of it; or all of it, if asked."""

import json
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.processes import run_module
from shards.errors import InputError
from shards.manifest import read_manifest

_WARM = 0.2
"""Share of the rows that are left out of the time of a step: compiling, first use of kernels, caches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeConfig:
    """A recipe to be timed."""

    shards: Path
    preset: str
    device: str
    backend: str
    steps: int | None
    """How many to run; None: all of them."""
    batch_size: int
    compile: bool
    threads: int | None
    minutes: float
    """When to give up."""


def run_recipe(config: RecipeConfig, out: Path) -> dict[str, Any]:
    """Train from weights drawn by chance (the time is the same) and say what the whole recipe takes.

    InputError where training fails.
    """
    from train.commandline import preset

    whole = preset(config.preset)
    began = time.perf_counter()
    _train(config, out)
    wall_s = time.perf_counter() - began
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    manifest = read_manifest(config.shards)
    found: dict[str, Any] = {
        "preset": config.preset,
        "whole": config.steps is None,
        "steps": rows[-1]["step"],
        "wall_s": wall_s,
        "batch_size": config.batch_size,
        "compile": config.compile,
        "train_rows": manifest.rows("train"),
        "val_rows": manifest.rows("val"),
        **pace(rows),
    }
    validations = whole.steps // whole.validate_every if whole.validate_every else 0
    return {**found, f"seconds_{whole.steps}": total_seconds(found, whole.steps, validations), "losses": losses(rows)}


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


def losses(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """First and last training loss, and the last validation loss: that it trained at all."""
    validated = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    return {"first": rows[0]["loss"], "last": rows[-1]["loss"], "validation": validated[-1] if validated else None}


def _train(config: RecipeConfig, out: Path) -> None:
    command = ["train.main", "--preset", config.preset, "--shards", config.shards, "--out", out]
    command += [
        "--vision-weights",
        "none",
        "--text-weights",
        "none",
        "--device",
        config.device,
        "--backend",
        config.backend,
    ]
    command += ["--batch-size", config.batch_size, *(["--compile"] if config.compile else [])]
    if config.threads is not None:
        command += ["--threads", config.threads, "--data.threads", config.threads]
    if config.steps is not None:
        # Two saves, so that the rows after the first say how long it held training up.
        half = max(1, config.steps // 2)
        command += ["--stop-at", config.steps, "--save-every", half, "--log-every", max(1, min(10, half // 5))]
        command += ["--validate-every", config.steps if read_manifest(config.shards).rows("val") else 0]
    code = run_module(command, seconds=config.minutes * 60, stdout=subprocess.DEVNULL)
    if code:
        late = f" after {config.minutes:g} minutes, which is the limit" if code == 124 else ""
        raise InputError(f"train.main ended with exit code {code}{late}; its message is in the log")
