"""The cases of a step bench: each trainer on one batch, eager and compiled, measured in turn."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bench.kinds import ratios, speed
from shards.cli import say

OURS, WHOLE, RIVAL = "step", "step, whole text", "open_clip"
COMPILED = " compiled"
NOTES = {
    OURS: "train.main's step: channels_last, text cut to the longest report, fused optimizer",
    WHOLE: "the same with the whole context of tokens, as open_clip's trainer has it",
    RIVAL: "open_clip_train's train_one_epoch, unchanged; whole context, contiguous images, its own optimizer's groups",
}
_WARM = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One trainer on one batch, ready to run."""

    name: str
    trainer: Any
    batch_size: int
    tokens: int
    """Tokens of each report that it computes with."""
    memory_bytes: int | None
    """Most that it took at once, weights and all; None on a CPU, where cases cannot be told apart."""
    first_s: float
    """Seconds of its first steps, compiling among them."""


def measure_size(setup: Any, batch: Any, size: int, top: dict[str, Any], config: Any) -> list[dict[str, Any]]:
    """All cases at one batch size, in turn, `config.rounds` times; a list of what each came to."""
    import torch

    from bench.limits import sized

    batch, device = sized(batch, size), setup.precision.device
    torch.compiler.reset()  # else the second size would be compiled for any size, which no training run is
    cases, missing = build_cases(setup, batch, compiled=config.compiled)
    steps = {case.name: max(2, math.ceil(config.seconds / timed(case.trainer.run, device, 2))) for case in cases}
    taken: dict[str, list[dict[str, float]]] = {case.name: [] for case in cases}
    for number in range(config.rounds):
        for case in cases:
            step_s = timed(case.trainer.run, device, steps[case.name])
            taken[case.name].append({"step_s": step_s, "images_per_s": size / step_s})
        told = "  ".join(f"{name} {rows[-1]['step_s'] * 1e3:,.1f} ms" for name, rows in taken.items())
        say(f"batch {size}, round {number + 1}/{config.rounds}  {told}")
    done = [summary(case, taken, setup, batch, top) for case in cases]
    return done + [{"name": name, "batch_size": size, "note": why} for name, why in missing.items()]


def build_cases(setup: Any, batch: Any, *, compiled: bool) -> tuple[list[Case], dict[str, str]]:
    """The cases that run here, and by name why others do not."""
    from bench.trainers import OpenClip, Ours

    whole = replace(batch, text_length=batch.tokens.shape[1])
    makers: dict[str, tuple[Callable[..., Any], Any]]
    makers = {OURS: (Ours, batch), WHOLE: (Ours, whole), RIVAL: (OpenClip, batch)}
    if compiled:  # but for WHOLE: what cutting the text brings is known by then, and compiling takes minutes
        makers |= {f"{OURS}{COMPILED}": (Ours, batch), f"{RIVAL}{COMPILED}": (OpenClip, batch)}
    cases, missing = [], {}
    for name, (maker, given) in makers.items():
        try:
            cases.append(build_case(name, maker, setup, given))
        except (ImportError, RuntimeError) as error:  # no compiler, or no memory: the other cases are worth having
            missing[name] = f"not measured: {error if isinstance(error, ImportError) else type(error).__name__}"
    return cases, missing


def build_case(name: str, maker: Callable[..., Any], setup: Any, batch: Any) -> Case:
    """Build a trainer and run its first steps."""
    import torch

    from bench.turns import finish
    from train.objective import cut_tokens

    device, began = setup.precision.device, time.perf_counter()
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    trainer = maker(setup, batch, compiled=name.endswith(COMPILED))
    trainer.run(_WARM)
    finish(device)
    cut = batch.tokens.shape[1] if name.startswith(RIVAL) else cut_tokens(batch.tokens, batch.text_length).shape[1]
    return Case(
        name=name,
        trainer=trainer,
        batch_size=len(batch),
        tokens=cut,
        memory_bytes=torch.cuda.max_memory_allocated(device) - before if cuda else None,
        first_s=time.perf_counter() - began,
    )


def timed(run: Callable[[int], None], device: Any, steps: int) -> float:
    """Seconds a step, over so many of them, from an idle device to an idle device."""
    from bench.turns import finish

    finish(device)
    begin = time.perf_counter()
    run(steps)
    finish(device)
    return (time.perf_counter() - begin) / steps


def summary(
    case: Case, rounds: dict[str, list[dict[str, float]]], setup: Any, batch: Any, top: dict[str, Any]
) -> dict[str, Any]:
    """Medians of a case, ratios within a round, FLOPs and share of the peak, memory, host gaps."""
    from bench.limits import count_flops

    rows = rounds[case.name]
    step_s, rates = statistics.median(row["step_s"] for row in rows), [row["images_per_s"] for row in rows]
    flops = count_flops(setup.model, batch.images[:4], batch.tokens[:4, : case.tokens]) * case.batch_size
    found: dict[str, Any] = {
        "name": case.name,
        "batch_size": case.batch_size,
        "step_s": step_s,
        **speed(rates),
        "tokens": case.tokens,
        "flops_per_step": flops,
        "mfu": flops / step_s / top["flops_per_s"],
        "memory_bytes": case.memory_bytes,
        "first_s": case.first_s,
        "note": NOTES[case.name.removesuffix(COMPILED)],
        **_host(case, setup.precision.device),
    }
    rival = RIVAL + (COMPILED if case.name.endswith(COMPILED) else "")
    if rival in rounds and case.name != rival:
        against = ratios(rates, [row["images_per_s"] for row in rounds[rival]])
        found |= {"ratio_to_open_clip": statistics.median(against)}
        found |= {"ratio_lowest": min(against), "ratio_highest": max(against)}
    return {**found, "rounds": rows}


def _host(case: Case, device: Any) -> dict[str, float | None]:
    """Launch time a step and the share of it without a kernel; nothing on a CPU, which is its own host."""
    if device.type != "cuda":
        return {"host_ms": None, "idle_share": None}
    from bench.limits import idle_share, launch_seconds

    run = case.trainer.run
    return {"host_ms": launch_seconds(run, device, _WARM) * 1e3, "idle_share": idle_share(run, device)}
