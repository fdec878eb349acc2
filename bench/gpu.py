"""`make gpu`: the tests marked `gpu`, bench.loader, step and together, and the recipe's first steps, into one JSON.

The HDF5 baseline reads `cxr.h5` beside the shards, or a file made of them. Where DALI does not run the `cpu` backend is
measured. A part that fails leaves the others alone. The JSON is written after each part, logs beside it where $OUT is
set: a machine may be lent for minutes. bench/results/README.md has the calls.
"""

import json
import os
import re
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from bench.case import Task, run_child
from bench.machine import environment, has_dali
from bench.processes import REPOSITORY, bench_guard, run_module
from bench.recipe import run_recipe
from bench.sizes import store_from_shards
from shards.atomic import write_json
from shards.cli import parse, say
from shards.errors import InputError
from shards.manifest import read_manifest

_CARRIED, _RESULTS = REPOSITORY / ".gpu", REPOSITORY / "bench" / "results"
_FEW = 10_000
"""Films of which a float32 file is made for the baselines: 4 GB."""
Part = Literal["tests", "loader", "step", "together", "recipe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuConfig:
    """Run the GPU tests and benches, and write their results as JSON."""

    out: Path | None = None
    """Folder of the JSON; None for $OUT, or bench/results. Parts that are in it already stay, if they are not run."""
    parts: tuple[Part, ...] = get_args(Part)
    """What to run, in this order."""
    shards: Path | None = None
    """Folder of shards; none: .gpu/shards, else a phantom."""
    rounds: int = 5
    """Rounds of each bench."""
    seconds: float = 2.0
    """About how long a case takes in each round."""
    batch_size: int = 64
    """Films in a batch."""
    largest_batch: int = 4096
    """Where the search for the best batch ends at the latest; 0: no search."""
    compiled: bool = True
    """Compile: the step beside the eager one, and the recipe."""
    recipe_steps: int = 500
    """Steps of the recipe to run."""
    whole: bool = False
    """Run the recipe to its end instead."""
    preset: str = "cxr-dinov3-clip"
    """The recipe."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: a dry run."""
    threads: int | None = None
    """Threads that decode, and on a CPU those of the arithmetic; none: one a CPU of the affinity mask."""
    minutes: float = 60
    """For all of it."""


def run_gpu(config: GpuConfig) -> Path:
    """Run everything; the path of the JSON. InputError where there is no GPU."""
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("make gpu needs a CUDA device and there is none here; nothing was measured")
    from shards.atomic import check_writable

    machine = environment()
    out = config.out or Path(os.environ.get("OUT", _RESULTS))
    check_writable(out, folder=True)
    name = str(machine["gpu"]) if config.device == "cuda" else "dry run"
    path = out / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    result = _before(_RESULTS / path.name) | _before(path) | {"bench": "gpu", "environment": machine}
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(os.environ.get("OUT", scratch))
        job = Job(config, scratch=Path(scratch), logs=logs, end=time.monotonic() + config.minutes * 60)
        for part in config.parts:
            began = time.perf_counter()
            say(f"{part}: {job.seconds_left:.0f} s are left")
            result[part] = _attempt(part, job) | {"took_s": round(time.perf_counter() - began, 1)}
            write_json(path, result)  # a call cut off keeps what was done
    return path


class Job:
    """What the parts share: the films, the clock, where logs go."""

    def __init__(self, config: GpuConfig, *, scratch: Path, logs: Path, end: float) -> None:
        self.config, self.scratch, self._logs, self._end = config, scratch, logs, end

    @property
    def seconds_left(self) -> float:
        """Until the end of the call."""
        return max(0.0, self._end - time.monotonic())

    @cached_property
    def films(self) -> tuple[Path, Path | None]:
        """Folder of shards, and the HDF5 file that they are made from or, of few films, could be made from.

        A phantom is drawn when a part first asks for it. InputError where no films can be had.
        """
        shards = self.config.shards or _CARRIED / "shards"
        if (shards / "manifest.json").exists():
            if (h5 := shards.parent / "cxr.h5").exists():
                return shards, h5
            few = read_manifest(shards).sources[0].rows <= _FEW
            return shards, store_from_shards(shards, self.scratch / "cxr.h5") if few else None
        if self.config.shards:
            raise InputError(f"{self.config.shards} holds no manifest.json; give a folder of shards")
        films, shards = self.scratch / "films", self.scratch / "shards"
        self.run(["ingest.phantom", "--out", films, "--samples", 2000])
        source = ["--h5", films / "cxr.h5", "--csv", films / "reports.csv"]
        self.run(["ingest", "--to-shards", shards, *source, "--group-column", "patient", "--val-fraction", "0.12"])
        return shards, films / "cxr.h5"

    @cached_property
    def where(self) -> list[Any]:
        """Device and backend: DALI, where it gives a batch here; where not, no other figure is lost."""
        backend, device = "cpu", self.config.device
        try:
            if not has_dali():
                raise InputError("no DALI here (nvidia-dali-cuda120, or -cuda130 for a CUDA 13 driver)")
            if device == "cuda":
                run_child(Task(loader="dali", shards=str(self.films[0].resolve()), device=device, seconds=0.1))
            backend = "auto"
        except InputError as error:
            say(f"the cpu backend is measured: {error}")
        return ["--device", device, "--backend", backend]

    def run(self, command: Sequence[Any]) -> None:
        """Run `python -m COMMAND` for as long as there is time. InputError, with its last line, where it fails."""
        module, allowed = command[0], self.seconds_left
        if allowed < 1:
            raise InputError(f"{module}: no time was left for it")
        log = self._logs / f"{module}.log"
        with open(log, "wb") as errors:
            code = run_module(command, seconds=allowed, stderr=errors)
        if code:
            say(said := log.read_text("utf-8", errors="replace").strip())
            why = f"not done after {allowed:.0f} s" if code == 124 else f"exit code {code}"
            raise InputError(f"{module}: {why}: {(said.splitlines() or ['silent'])[-1][:300]}")


def _attempt(part: Part, job: Job) -> dict[str, Any]:
    """What a part came to, or why it failed: whatever the reason, the others are worth having."""
    try:
        return _PARTS[part](job)
    except InputError as error:
        return {"failed": str(error)}
    except Exception as error:
        say(traceback.format_exc())
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def _before(path: Path) -> dict[str, Any]:
    """The parts of an earlier call, which may have had time for some only."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("bench") == "gpu" else {}


def _tests(job: Job) -> dict[str, Any]:
    """Run the tests marked gpu; their summary and exit code."""
    files = [path for path in sorted(REPOSITORY.glob("tests/test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    log = job.scratch / "tests.log"  # other files may import what such a machine does not have
    command = ["pytest", "-m", "gpu", "-q", "-rs", "--durations=5", "-p", "no:cacheprovider", *files]
    with open(log, "wb") as out:
        code = run_module(command, seconds=job.seconds_left, stdout=out, stderr=subprocess.STDOUT)
    said = log.read_text("utf-8", errors="replace")
    say(said)
    lines = [line for line in said.splitlines() if line.startswith(("FAILED", "SKIPPED", "ERROR"))]
    return {"exit_code": code, "summary": said.strip().splitlines()[-1:], "not_passed": lines}


def _bench(job: Job, module: str, *more: Any) -> dict[str, Any]:
    """Run a bench as a process of its own; what it wrote."""
    config, path = job.config, job.scratch / f"{module}.json"
    command: list[Any] = [module, "--shards", job.films[0], "--json", path, "--rounds", config.rounds]
    command += [] if config.threads is None else ["--threads", config.threads]
    job.run([*command, "--seconds", config.seconds, "--batch-size", config.batch_size, *more])
    return json.loads(path.read_bytes())


def _loader(job: Job) -> dict[str, Any]:
    return _bench(job, "bench.loader", "--no-together", *(["--h5", job.films[1]] if job.films[1] else []))


def _step(job: Job) -> dict[str, Any]:
    more = "--preset", job.config.preset, "--largest-batch", job.config.largest_batch, *job.where
    return _bench(job, "bench.step", *more, "--compiled" if job.config.compiled else "--no-compiled")


def _together(job: Job) -> dict[str, Any]:
    compiled = ["--compile"] if job.config.compiled else []
    return _bench(job, "bench.together", "--preset", job.config.preset, *job.where, *compiled)


def _recipe(job: Job) -> dict[str, Any]:
    config = job.config
    options = [*job.where, "--batch-size", config.batch_size, *(["--compile"] if config.compiled else [])]
    if config.threads is not None:
        options += ["--threads", config.threads, "--data.threads", config.threads]
    steps = None if config.whole else config.recipe_steps
    found = run_recipe(job.run, config.preset, job.films[0], job.scratch / "recipe", steps=steps, options=options)
    return found | {"batch_size": config.batch_size, "compile": config.compiled}


_PARTS: dict[str, Callable[[Job], dict[str, Any]]]
_PARTS = {"tests": _tests, "loader": _loader, "step": _step, "together": _together, "recipe": _recipe}


def main(argv: list[str] | None = None) -> None:
    with bench_guard("bench.gpu"):
        config = parse(GpuConfig, argv, prog="python -m bench.gpu")
        path = run_gpu(config)
        say(f"written to {path}")
        found = json.loads(path.read_bytes())
        failed = [part for part in config.parts if "failed" in found[part] or found[part].get("exit_code")]
        if failed:
            say(f"failed: {', '.join(failed)}")
            raise SystemExit(1)


if __name__ == "__main__":
    main()
