"""`python -m bench.step`: how long a training step takes, what of the machine it uses, and against open_clip's trainer.

The cases of a batch size are measured in turn, round by round, on equal towers and the same batch, which is resident:
no loader plays a part (that is bench.together's business). `bench.trainers` says what each trainer is given.
"""

import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.machine import bench_main, environment
from bench.step_cases import COMPILED, OURS, measure_size
from bench.together import TrainBenchConfig, train_config
from shards.cli import say
from shards.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBenchConfig(TrainBenchConfig):
    """Measure the training step, eager and compiled, at batch 64 and at the best one, next to open_clip's trainer."""

    largest_batch: int = 4096
    """Where the search for the best batch ends at the latest; 0: no search."""
    seconds: float = 2.0
    """About how long each case takes in each round."""
    compiled: bool = True
    """Measure compiled steps as well."""

    def __post_init__(self) -> None:
        TrainBenchConfig.__post_init__(self)
        if self.largest_batch < 0:
            raise InputError(f"--largest-batch {self.largest_batch} is below 0")


def run_step(config: StepBenchConfig) -> dict[str, Any]:
    from bench.turns import BARE, RESIDENT, take_turns

    with tempfile.TemporaryDirectory() as scratch:
        settings = train_config(config, Path(scratch) / "run", compiled=False)  # the loop is timed on the eager step
        say(f"building {settings.preset}, reading a batch")
        setup, batch = prepare(settings)
        from bench.limits import best_batch, give_back, peak, search_batch, sized
        from bench.trainers import Ours

        device = setup.precision.device
        top = peak(device, setup.precision.name)
        tried = search_batch(  # the eager step: compiling anew for each size would take longer than the search
            lambda size: Ours(setup, sized(batch, size), compiled=False),
            device,
            first=config.batch_size,
            largest=config.largest_batch,
            seconds=config.seconds,
        )
        best = best_batch(tried) if tried else None
        sizes = dict.fromkeys([config.batch_size, best or config.batch_size])
        cases = [found for size in sizes for found in measure_size(setup, batch, size, top, config)]
        give_back(device)
        say("the loop around the step:")
        taken = take_turns(settings, (BARE, RESIDENT), rounds=2 * config.rounds, seconds=config.seconds)
    said = {
        "preset": settings.preset,
        "batch_size": config.batch_size,
        "best_batch": best,
        "seconds": config.seconds,
        "device": device.type,
        "precision": setup.precision.name,
        "text_length": batch.text_length,
        "context": batch.tokens.shape[1],
        "log_every": settings.log_every,
    }
    result: dict[str, Any] = {"bench": "step", "environment": environment(), "settings": said, "peak": top}
    result |= {"cases": cases, "search": tried, "loop": loop_overhead(taken.rounds, device.type)}
    return {**result, "verdict": verdict(result)}


def prepare(settings: Any) -> tuple[Any, Any]:
    """The towers as they begin, and a batch that was read through the loader."""
    from bench.trainers import Setup
    from bench.turns import keep
    from train.job import build_job, build_setting
    from train.ranks import Ranks

    job = build_job(build_setting(replace(settings, validate_every=0), Ranks()), None, None)
    with job.loader:
        batch = keep(next(job.loader))
    return Setup(config=settings, model=job.learner.model, precision=job.precision), batch


def loop_overhead(rounds: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """What the loop adds to a bare step: as a difference of turns within a round, and looked at from inside.

    `overhead` is the median of resident / bare - 1. `inside` is the loop's own time over the step's: seconds between
    the end of a call of the step and the beginning of the next, without the wait for the batch; on a CPU alone, because
    a GPU is still at work then.
    """
    shares = [turns["resident"].seconds / turns["bare step"].seconds - 1 for turns in rounds]
    found: dict[str, Any] = {
        "overhead": statistics.median(shares),
        "lowest": min(shares),
        "highest": max(shares),
        "rounds": [{name: turn.seconds / turn.steps for name, turn in turns.items()} for turns in rounds],
        "inside": None,
    }
    if device == "cpu":
        turns = [found["resident"] for found in rounds]
        found["inside"] = statistics.median((t.seconds - t.wait_s - t.inside_s) / t.inside_s for t in turns)
        found["inside_ms"] = statistics.median((t.seconds - t.wait_s - t.inside_s) / t.steps * 1e3 for t in turns)
    return found


def verdict(result: dict[str, Any]) -> str:
    """The result in a sentence."""
    timed = [case for case in result["cases"] if case["name"].removesuffix(COMPILED) == OURS and "step_s" in case]
    ours = max(timed, key=lambda case: case["images_per_s"])
    told = (
        f"The fastest step is '{ours['name']}' at batch {ours['batch_size']}: {ours['step_s'] * 1e3:,.1f} ms, "
        f"{ours['images_per_s']:,.0f} films/s, {ours['mfu']:.0%} of {result['peak']['source']}"
    )
    ratios = [
        f"{case['ratio_to_open_clip']:.2f}x ({case['ratio_lowest']:.2f} to {case['ratio_highest']:.2f}) "
        f"{'compiled' if case['name'].endswith(COMPILED) else 'eager'} at batch {case['batch_size']}"
        for case in timed
        if "ratio_to_open_clip" in case
    ]
    against = f"; against open_clip's trainer {', '.join(ratios)}" if ratios else ""
    loop = result["loop"]
    inside = f", {loop['inside']:.2%} looked at from inside" if loop["inside"] is not None else ""
    return f"{told}{against}; the loop adds {loop['overhead']:+.1%} to a bare step{inside}."


def main(argv: list[str] | None = None) -> None:
    bench_main("bench.step", StepBenchConfig, argv, run_step)


if __name__ == "__main__":
    main()
