"""`make gpu`: all that only a GPU can say, on a machine with CUDA and DALI, into one JSON.

    tests     the tests marked `gpu`
    loader    bench.loader: every loader that runs there
    step      bench.step: the step of the recipe next to open_clip's trainer
    together  bench.together: what the loader costs training
    recipe    train.main: the recipe's first 500 steps and the time of all of them extrapolated, or run whole

The films are real ones where `.gpu/shards` holds a set (carried there), else a phantom drawn on the spot. The HDF5
baseline needs the HDF5 file too: `.gpu/cxr.h5`, or the phantom's. Without DALI all is measured on the `cpu` backend.
`--device cpu --preset tiny` goes the same way without a GPU, to see that it can be gone.

Where a machine is lent for ten minutes a command, give parts to each (`--parts step --largest-batch 512 --minutes 9`)
and put the JSON into bench/results before the next: what is in it stays.
"""

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.machine import environment, has_dali
from bench.processes import REPOSITORY, bench_guard, run_module
from bench.recipe import RecipeConfig, run_recipe
from shards.cli import parse, say
from shards.errors import InputError

_CARRIED, _RESULTS = REPOSITORY / ".gpu", REPOSITORY / "bench" / "results"
Part = Literal["tests", "loader", "step", "together", "recipe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuConfig:
    """Run the GPU tests and benches, and write their results as JSON."""

    out: Path | None = None
    """Folder of the JSON; None for $OUT, or bench/results. Parts that are in it already stay, if they are not run."""
    parts: tuple[Part, ...] = ("tests", "loader", "step", "together", "recipe")
    """What to run, in this order."""
    shards: Path | None = None
    """Folder of shards; none: .gpu/shards, else a phantom."""
    samples: int = 2000
    """Films of the phantom."""
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
    minutes: float = 30
    """A part that takes longer is given up."""


def run_gpu(config: GpuConfig) -> Path:
    """Run everything; InputError where there is no GPU. Returns the path of the JSON."""
    if config.device == "cuda":
        _require_gpu()
    from shards.atomic import check_writable, write_atomic

    machine = environment()
    out = config.out or Path(os.environ.get("OUT", _RESULTS))
    check_writable(out, folder=True)
    name = str(machine["gpu"]) if config.device == "cuda" else "dry run"
    path = out / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    result = _before(_RESULTS / path.name) | _before(path) | {"bench": "gpu", "environment": machine}
    if not has_dali():
        say("no DALI here (nvidia-dali-cuda120, or -cuda130 for a CUDA 13 driver): the cpu backend is measured")
    with tempfile.TemporaryDirectory() as scratch:
        films = _films(config, Path(scratch)) if set(config.parts) - {"tests"} else None
        for part in config.parts:
            began = time.perf_counter()
            result[part] = _PARTS[part](config, films, Path(scratch))
            result[part]["took_s"] = round(time.perf_counter() - began, 1)
            write_atomic(path, _encode(result))  # what is known survives a part that fails
    return path


@dataclass(frozen=True, kw_only=True, slots=True)
class Films:
    """What the benches read."""

    shards: Path
    h5: Path | None
    """The HDF5 file that they were made from, for the baselines."""


def _before(path: Path) -> dict[str, Any]:
    """The parts of an earlier call, which may have had time for some only."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("bench") == "gpu" else {}


def _encode(result: dict[str, Any]) -> bytes:
    return (json.dumps(result, indent=1) + "\n").encode()


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError("make gpu needs a CUDA device and there is none here; nothing was measured")


def _films(config: GpuConfig, scratch: Path) -> Films:
    shards = config.shards or _CARRIED / "shards"
    if (shards / "manifest.json").exists():
        carried = _CARRIED / "cxr.h5"
        return Films(shards=shards, h5=carried if carried.exists() and not config.shards else None)
    if config.shards:
        raise InputError(f"{config.shards} holds no manifest.json; give a folder of shards")
    return _phantom(config, scratch)


def _phantom(config: GpuConfig, scratch: Path) -> Films:
    films, shards = scratch / "films", scratch / "shards"
    for command in (
        ["ingest.phantom", "--out", films, "--samples", str(config.samples)],
        [
            *("ingest", "--to-shards", shards, "--h5", films / "cxr.h5", "--csv", films / "reports.csv"),
            *("--group-column", "patient", "--val-fraction", "0.12"),
        ],
    ):
        if run_module(command, seconds=config.minutes * 60):
            raise InputError(f"could not make the phantom: {command[0]} failed")
    return Films(shards=shards, h5=films / "cxr.h5")


def _tests(config: GpuConfig, _films: Films | None, scratch: Path) -> dict[str, Any]:
    """Run the tests marked gpu; their summary and exit code."""
    files = [path for path in sorted(REPOSITORY.glob("tests/test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    log = scratch / "tests.log"  # other files may import what such a machine does not have
    with open(log, "wb") as out:
        code = run_module(
            ["pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files],
            seconds=config.minutes * 60, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    said = log.read_text("utf-8", errors="replace")
    say(said)
    lines = [line for line in said.splitlines() if line.startswith(("FAILED", "SKIPPED", "ERROR"))]
    return {"exit_code": code, "summary": said.strip().splitlines()[-1:], "not_passed": lines}


def _loader(config: GpuConfig, films: Films, scratch: Path) -> dict[str, Any]:
    more = ["--no-together", *(["--h5", films.h5] if films.h5 else [])]
    return _bench(config, "bench.loader", films, scratch, more)


def _step(config: GpuConfig, films: Films, scratch: Path) -> dict[str, Any]:
    more = ["--preset", config.preset, "--device", config.device, "--backend", _backend()]
    more += ["--largest-batch", str(config.largest_batch)]
    return _bench(config, "bench.step", films, scratch, [*more, "--compiled" if config.compiled else "--no-compiled"])


def _together(config: GpuConfig, films: Films, scratch: Path) -> dict[str, Any]:
    more = ["--preset", config.preset, "--device", config.device, "--backend", _backend()]
    return _bench(config, "bench.together", films, scratch, [*more, *(["--compile"] if config.compiled else [])])


def _backend() -> str:
    return "auto" if has_dali() else "cpu"


def _bench(config: GpuConfig, module: str, films: Films, scratch: Path, more: list[Any]) -> dict[str, Any]:
    """Run a bench as a process of its own; what it wrote."""
    path = scratch / f"{module}.json"
    command: list[Any] = [module, "--shards", films.shards, "--json", path, "--rounds", config.rounds]
    command += [] if config.threads is None else ["--threads", config.threads]
    command += ["--seconds", config.seconds, "--batch-size", config.batch_size, *more]
    log = scratch / f"{module}.log"
    with open(log, "wb") as errors:
        code = run_module(command, seconds=config.minutes * 60, stderr=errors)
    if code == 0:
        return json.loads(path.read_bytes())
    said = log.read_text("utf-8", errors="replace").strip()
    say(said)
    late = f"not done after {config.minutes:g} minutes" if code == 124 else f"exit code {code}"
    return {"failed": f"{module}: {late}: {(said.splitlines() or ['silent'])[-1][:300]}"}


def _recipe(config: GpuConfig, films: Films, scratch: Path) -> dict[str, Any]:
    wanted = RecipeConfig(
        shards=films.shards,
        preset=config.preset,
        device=config.device,
        backend=_backend(),
        steps=None if config.whole else config.recipe_steps,
        batch_size=config.batch_size,
        compile=config.compiled,
        threads=config.threads,
        minutes=config.minutes,
    )
    try:
        return run_recipe(wanted, scratch / "recipe")
    except InputError as error:
        return {"failed": str(error)}


_PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "tests": _tests,
    "loader": _loader,
    "step": _step,
    "together": _together,
    "recipe": _recipe,
}


def main(argv: list[str] | None = None) -> None:
    """Run the GPU tests and benches; exit code 1 where one failed."""
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
