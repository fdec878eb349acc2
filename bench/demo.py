"""`make demo`: the whole path on a made-up data set, each step the command a user would type, and a summary at the end.

phantom -> ingest -> torchrun train.main -> train.evaluate -> bench.loader
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import environment
from shards.atomic import write_json
from shards.cli import main_guard, parse, say
from shards.errors import InputError

_MARK = ".shardclip-demo"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Draw 4,000 films, ingest, train, evaluate, and bench them."""

    out: Path = Path("demo")
    """Folder for everything the demo makes; an earlier demo in it is removed."""
    samples: int = 4000
    """Films to draw."""
    steps: int | None = None
    """Training steps; None for the preset's."""
    seed: int = 0
    """Seed of films, split and training."""
    rounds: int = 3
    """Rounds of the loader bench."""


class Places:
    """Where the demo puts things, all of them under `root`."""

    def __init__(self, root: Path) -> None:
        self.h5, self.csv, self.shards = root / "films" / "cxr.h5", root / "films" / "reports.csv", root / "shards"
        self.run, self.bench, self.result = root / "run", root / "bench.json", root / "demo.json"


def demo_commands(config: DemoConfig, places: Places) -> list[list[str]]:
    """The commands, in order, without the interpreter."""
    from ingest.phantom_case import LABELS

    steps = [] if config.steps is None else ["--steps", str(config.steps)]
    seed = ["--seed", str(config.seed)]
    source = ["--h5", str(places.h5), "--csv", str(places.csv)]
    shards = ["--shards", str(places.shards)]
    splits = ["--group-column", "patient", "--val-fraction", "0.1", "--test-fraction", "0.1", "--shard-mb", "32"]
    train = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "train.main", "--preset", "tiny"]
    bench = ["--json", str(places.bench), "--rounds", str(config.rounds), "--seconds", "2"]
    return [
        ["ingest.phantom", "--out", str(places.h5.parent), "--samples", str(config.samples), *seed],
        ["ingest", "--to-shards", str(places.shards), *source, "--label-columns", *LABELS, *splits, *seed],
        ["shards", "verify", str(places.shards)],
        [*train, *shards, "--out", str(places.run), *steps, *seed],
        ["train.evaluate", "--checkpoint", str(places.run), *shards, "--split", "test"],
        ["bench.loader", *shards, *source, *bench, "--only", "hdf5", "hdf5-tuned", "cpu"],
    ]


def run_demo(config: DemoConfig) -> None:
    """Run every command; InputError, naming it, where one fails."""
    places = Places(config.out)
    _clear(config.out)
    started = time.monotonic()
    seconds = run_commands(demo_commands(config, places), what="the demo")
    result = collect(places, {**seconds, "all": round(time.monotonic() - started, 1)})
    write_json(places.result, result)
    say("\n" + "\n".join(summary(places, result)))


def run_commands(commands: list[list[str]], *, what: str) -> dict[str, float]:
    """Run commands in turn, each shown as a user would type it: seconds by command. InputError where one fails."""
    seconds = {}
    for command in commands:
        say(f"\n$ {typed(command)}")
        began = time.monotonic()
        # torchrun would set it to the same and say so in four lines.
        done = subprocess.run([sys.executable, "-m", *command], env={"OMP_NUM_THREADS": "1", **os.environ})
        if done.returncode:
            raise InputError(f"{what} stopped: {command[0]} ended with exit code {done.returncode}, see above")
        shown = _program(command[0])
        seconds[shown] = round(time.monotonic() - began, 1)
        say(f"({seconds[shown]:.0f} s)")
    return seconds


def typed(command: list[str]) -> str:
    """A command as a user would type it."""
    return shlex.join([*_program(command[0]).split(), *command[1:]])


def _program(module: str) -> str:
    return "torchrun" if module == "torch.distributed.run" else f"python -m {module}"


def _clear(out: Path) -> None:
    """Remove an earlier demo; InputError where the folder holds anything else."""
    if out.exists() and any(out.iterdir()) and not (out / _MARK).exists():
        raise InputError(f"{out} is not empty and was not made by the demo; choose another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).touch()


def collect(places: Places, seconds: dict[str, float]) -> dict[str, Any]:
    """Everything that came of the demo, with the machine it ran on."""
    rows = [json.loads(line) for line in (places.run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "bench": "demo",
        "environment": environment(),
        "seconds": seconds,
        "validation": [{"step": row["step"], "loss": row["val_loss"]} for row in rows if "val_loss" in row],
        "evaluation": json.loads((places.run / "evaluation-test.json").read_bytes()),
        "loader": json.loads(places.bench.read_bytes())["cases"],
    }


def summary(places: Places, result: dict[str, Any]) -> list[str]:
    """What came of it: where things are, what the model learnt, how fast the loader is."""
    first, last = result["validation"][0], result["validation"][-1]
    told = {
        "shards": places.shards,
        "checkpoint": places.run / "best.pt",
        "curves": places.run / "curves.png",
        "results": places.result,
        "validation loss": f"{first['loss']:.3f} at step {first['step']}, {last['loss']:.3f} at step {last['step']}",
    }
    scores = {name: score["auroc"] for name, score in result["evaluation"]["labels"].items()}
    scores["mean"] = result["evaluation"]["mean_auroc"]
    rates = {case["name"]: (case["images_per_s"], case["ratio_to_hdf5"]) for case in result["loader"]}
    return [
        f"The demo took {result['seconds']['all'] / 60:.1f} minutes.",
        *(f"  {what:<16} {value}" for what, value in told.items()),
        "  zero-shot AUROC on held-out patients",
        *(f"    {name:<28} {auroc:.3f}" for name, auroc in scores.items() if auroc is not None),
        "  films/s on this machine, loader alone",
        *(f"    {name:<28} {rate:7,.0f}   {ratio:.2f}x the HDF5 baseline" for name, (rate, ratio) in rates.items()),
    ]


def main(argv: list[str] | None = None) -> None:
    with main_guard("bench.demo"):
        run_demo(parse(DemoConfig, argv, prog="python -m bench.demo"))


if __name__ == "__main__":
    main()
