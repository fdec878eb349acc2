"""`make gpu`: on a machine with CUDA and DALI, the tests marked `gpu` and the loader bench, into one JSON.

The films are real ones where `.gpu/shards` holds a set (carried there), else a phantom drawn on the spot. The HDF5
baseline needs the HDF5 file too: `.gpu/cxr.h5`, or the phantom's.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.cli import main_guard, parse, say
from shards.errors import InputError

_ROOT = Path(__file__).resolve().parent.parent
_CARRIED = _ROOT / ".gpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuConfig:
    """Run the GPU tests and benches, and write their results as JSON."""

    out: Path | None = None
    """Folder of the JSON; None for $OUT, or bench/results."""
    samples: int = 2000
    """Films of the phantom, where no set was carried over."""
    rounds: int = 5
    """Rounds of the loader bench."""


def run_gpu(config: GpuConfig) -> Path:
    """Run everything; InputError where there is no GPU or no DALI. Returns the path of the JSON."""
    _require_gpu()
    from bench.environment import environment
    from shards.atomic import check_writable, write_atomic

    machine = environment()
    out = config.out or Path(os.environ.get("OUT", _ROOT / "bench" / "results"))
    check_writable(out, folder=True)
    path = out / f"{re.sub(r'[^a-z0-9]+', '-', str(machine['gpu']).lower()).strip('-')}.json"
    result: dict[str, Any] = {"environment": machine, "tests": _tests()}
    write_atomic(path, _encode(result))  # what is known survives a bench that fails
    with tempfile.TemporaryDirectory() as scratch:
        result["loader"] = _loader(config, Path(scratch))
    write_atomic(path, _encode(result))
    return path


def _encode(result: dict[str, Any]) -> bytes:
    return (json.dumps(result, indent=1) + "\n").encode()


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError("make gpu needs a CUDA device and there is none here; nothing was measured")
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        raise InputError("make gpu needs DALI: pip install nvidia-dali-cuda120 (or -cuda130 for a CUDA 13 driver)")


def _tests() -> dict[str, Any]:
    """Run the tests marked gpu; their summary and exit code. Shown as they run."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    say(done.stdout)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "SKIPPED", "ERROR"))]
    return {"exit_code": done.returncode, "summary": done.stdout.strip().splitlines()[-1:], "not_passed": lines}


def _loader(config: GpuConfig, scratch: Path) -> dict[str, Any]:
    shards, h5 = _CARRIED / "shards", _CARRIED / "cxr.h5"
    if not (shards / "manifest.json").exists():
        shards, h5 = _phantom(config, scratch)
    command = [sys.executable, "-m", "bench.loader", "--shards", str(shards), "--json", str(scratch / "loader.json")]
    command += ["--rounds", str(config.rounds)] + (["--h5", str(h5)] if h5.exists() else [])
    if subprocess.run(command, cwd=_ROOT).returncode:
        return {"failed": "bench.loader ended with an error; its message is in the log"}
    return json.loads((scratch / "loader.json").read_bytes())


def _phantom(config: GpuConfig, scratch: Path) -> tuple[Path, Path]:
    films, shards = scratch / "films", scratch / "shards"
    for command in (
        ["ingest.phantom", "--out", films, "--samples", str(config.samples)],
        ["ingest", "--to-shards", shards, "--h5", films / "cxr.h5", "--csv", films / "reports.csv"],
    ):
        if subprocess.run([sys.executable, "-m", *map(str, command)], cwd=_ROOT).returncode:
            raise InputError(f"could not make the phantom: {command[0]} failed")
    return shards, films / "cxr.h5"


def main(argv: list[str] | None = None) -> None:
    """Run the GPU tests and benches."""
    with main_guard("bench.gpu"):
        config = parse(GpuConfig, argv, prog="python -m bench.gpu")
        say(f"written to {run_gpu(config)}")


if __name__ == "__main__":
    main()
