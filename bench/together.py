"""`python -m bench.together --shards OUT`: what the loader costs training, measured as a difference.

Training on live batches is compared, turn by turn, with training on batches that are there already (bench.turns), so
that waiting and what decoding takes away from the step both show. The verdict is one sentence.
"""

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bench.kinds import speed
from bench.machine import bench_main, check_positive, environment

CASES = ("resident", "replayed", "live", "loader alone")
WAITING = 0.01
"""DESIGN's bound: training waits for data under 1 % of the time."""
HELD_UP = 0.05
"""Waiting above this is the loader's pace; below it is a hitch now and then, or cores that are shared."""
IDLE = 0.5
"""A loader that keeps less than this share of its threads busy waits for files: more threads do not help it."""
TUNE = "python -m bench.loader --tune, and train.main --loader-config with what it writes"
SPARE = 1.25
"""CPUs to ask for, over those that decode without a pause: others read, copy and launch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBenchConfig:
    """What the benches of training share."""

    shards: Path
    """Folder of shards."""
    preset: str | None = None
    """What to train; none: cxr-dinov3-clip on a GPU, tiny on a CPU. Weights are drawn by chance, no file is read."""
    json: Path | None = None
    """Where the results go, as JSON."""
    batch_size: int = 64
    """Films in a batch."""
    rounds: int = 5
    """Rounds; medians are taken over them."""
    seconds: float = 3.0
    """About how long each case takes in each round."""
    backend: Literal["auto", "cpu", "dali"] = "auto"
    """Loader; auto: dali where the device is a GPU, else cpu."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has it, else fp16; fp32 on a CPU."""
    threads: int | None = None
    """Threads that decode, and on a CPU those of the arithmetic; none: one a CPU of the affinity mask."""
    loader_config: Path | None = None
    """The loader's settings as `bench.loader --tune` wrote them: what they bring to training."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "rounds", "seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class TogetherConfig(TrainBenchConfig):
    """Measure what the loader costs training: live, replayed and resident batches, through train.main's own loop."""

    compile: bool = False
    """Compile the step."""


def run_together(config: TogetherConfig) -> dict[str, Any]:
    from bench.turns import take_turns

    with tempfile.TemporaryDirectory() as scratch:
        settings = train_config(config, Path(scratch) / "run", compiled=config.compile)
        taken = take_turns(settings, CASES, rounds=config.rounds, seconds=config.seconds)
    found = environment({"shards": config.shards})
    rounds = {name: [turns[name].row(config.batch_size) for turns in taken.rounds] for name in CASES}
    cases = [summary(name, rows) for name, rows in rounds.items()]
    findings = compare(rounds, cpus=found["cpus"], device=taken.device.type)
    said = {
        "preset": settings.preset,
        "batch_size": config.batch_size,
        "seconds": config.seconds,
        "compile": config.compile,
        "backend": taken.backend,
        "device": taken.device.type,
        "precision": taken.precision,
        "threads": settings.data.threads or found["cpus"],
        **({"loader_config": True} if config.loader_config else {}),
        "log_every": settings.log_every,
        "text_length": taken.text_length,
    }
    result = {"bench": "together", "environment": found, "settings": said, "cases": cases, "findings": findings}
    return {**result, "advice": advice(findings, said), "verdict": verdict(findings, said)}


def train_config(config: Any, out: Path, *, compiled: bool) -> Any:
    """The run to measure: the preset from chance weights, without validation and checkpoints."""
    import torch

    from train.commandline import preset, tuned

    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    base = preset(config.preset or ("cxr-dinov3-clip" if cuda else "tiny"))
    if config.loader_config:
        base = tuned(base, config.loader_config)
    data = base.data if config.threads is None else replace(base.data, threads=config.threads)
    return replace(
        base,
        shards=config.shards,
        out=out,
        batch_size=config.batch_size,
        backend=base.backend if config.backend == "auto" else config.backend,
        device=config.device,
        precision=config.precision,
        compile=compiled,
        vision_weights="none",
        text_weights="none",
        threads=config.threads,
        data=data,
    )


def summary(name: str, rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians of a case, the spread of its speed, and the rounds themselves."""
    names = ("step_s", "wait_s", "wait_share", "cpu_s_per_1000")
    medians = {key: statistics.median(row[key] for row in rows) for key in names}
    return {"name": name, **medians, **speed([row["images_per_s"] for row in rows]), "rounds": list(rows)}


def compare(rounds: dict[str, list[dict[str, float]]], *, cpus: int, device: str) -> dict[str, Any]:
    """What the turns say of each other, taken within each round; medians, and of the main one the spread."""

    def share(name: str, other: str) -> list[float]:
        pairs = zip(rounds[name], rounds[other], strict=True)
        return [row["step_s"] / base["step_s"] - 1 for row, base in pairs]

    cost, middle = share("live", "replayed"), statistics.median
    loader = rounds["loader alone"]
    return {
        "loader_cost": middle(cost),
        "loader_cost_lowest": min(cost),
        "loader_cost_highest": max(cost),
        "wait_share": middle(row["wait_share"] for row in rounds["live"]),
        "replay_cost": middle(share("replayed", "resident")),
        "loader_over_step": middle(
            row["images_per_s"] / base["images_per_s"] for row, base in zip(loader, rounds["replayed"], strict=True)
        ),
        "loader_busy_cpus": middle(row["images_per_s"] * row["cpu_s_per_1000"] / 1e3 for row in loader),
        "loader_cpu_s_per_1000": middle(row["cpu_s_per_1000"] for row in loader),
        "step_images_per_s": middle(row["images_per_s"] for row in rounds["replayed"]),
        "cpus": cpus,
        "device": device,
    }


def cpus_for(findings: dict[str, Any], images_per_s: float) -> int:
    """CPUs that a GPU which takes so many films a second needs for decoding and all beside it."""
    busy = images_per_s * findings["loader_cpu_s_per_1000"] / 1e3
    return max(2, math.ceil(busy * SPARE) + 1)


def advice(findings: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """How many CPUs per GPU to ask SLURM for, and the setting to change first."""
    cpus = cpus_for(findings, findings["step_images_per_s"]) if findings["device"] == "cuda" else None
    return {"cpus_per_gpu": cpus, "first": first_change(findings, settings, cpus)}


def first_change(findings: dict[str, Any], settings: dict[str, Any], cpus: int | None) -> str:
    """The one setting that promises most."""
    if findings["wait_share"] > WAITING and (cpus is not None or is_loader_bound(findings)):
        if findings["loader_busy_cpus"] < IDLE * min(settings["threads"], findings["cpus"]):
            return f"how it reads, for its CPUs wait ({findings['loader_busy_cpus']:.1f} busy): {TUNE}"
        if settings["threads"] < findings["cpus"]:
            return f"--data.threads {findings['cpus']} (now {settings['threads']})"
        if settings["device"] == "cuda" and settings["backend"] == "cpu":
            return "--backend dali, which decodes on the GPU"
        if cpus is not None and cpus > findings["cpus"]:
            return f"--cpus-per-task {cpus} for each GPU (now {findings['cpus']})"
        return TUNE
    if settings["device"] == "cuda" and not settings["compile"]:
        return "--compile"
    if settings["device"] == "cpu":
        return "a GPU: here the step is what takes the time"
    return "--batch-size, to what bench.step finds best"


def is_loader_bound(findings: dict[str, Any]) -> bool:
    """Whether the loader cannot keep up: by itself, or as far as it gets beside the step."""
    return findings["loader_over_step"] < 1 or findings["wait_share"] > HELD_UP


def verdict(findings: dict[str, Any], settings: dict[str, Any]) -> str:
    """The result in one sentence."""
    wait, cost, told = findings["wait_share"], findings["loader_cost"], advice(findings, settings)
    low, high = findings["loader_cost_lowest"], findings["loader_cost_highest"]
    spread = f"{low:+.1%} to {high:+.1%}" + (", lost in the noise" if low < 0 < high else "")
    bound = "Loader-bound" if is_loader_bound(findings) else "Step-bound"
    why = (
        f"{bound}: training waits for data {wait:.1%} of the time, and "
        f"live batches change the time of a step by {cost:+.1%} ({spread}) against replayed ones; alone the loader "
        f"gives {findings['loader_over_step']:.1f} times what the step takes"
    )
    if findings["device"] == "cuda":
        return (
            f"{why}; ask SLURM for --cpus-per-task {told['cpus_per_gpu']} for each GPU; change first: {told['first']}."
        )
    spent = findings["loader_cpu_s_per_1000"]
    return (
        f"{why}; decoding and step share {findings['cpus']} CPUs here, so the difference is what decoding takes from "
        f"the step, and of a GPU it says this alone: at {spent:.2f} CPU seconds for 1,000 films, one that takes 1,000 "
        f"films/s wants --cpus-per-task {cpus_for(findings, 1000.0)}; change first: {told['first']}."
    )


def main(argv: list[str] | None = None) -> None:
    bench_main("bench.together", TogetherConfig, argv, run_together)


if __name__ == "__main__":
    main()
