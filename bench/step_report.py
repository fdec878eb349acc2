"""What a step bench came to: the loop's share, a sentence, a table."""

import statistics
from collections.abc import Callable
from typing import Any

from bench.step_cases import COMPILED, OURS


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
    timed = [case for case in result["cases"] if "step_s" in case]
    ours = max((case for case in timed if case["name"].startswith(OURS)), key=lambda case: case["images_per_s"])
    told = (
        f"The fastest step is '{ours['name']}' at batch {ours['batch_size']}: {ours['step_s'] * 1e3:,.1f} ms, "
        f"{ours['images_per_s']:,.0f} films/s, {ours['mfu']:.0%} of {result['peak']['source']}"
    )
    ratios = [
        f"{case['ratio_to_open_clip']:.2f}x ({case['ratio_lowest']:.2f} to {case['ratio_highest']:.2f}) {state} at "
        f"batch {case['batch_size']}"
        for case in timed
        for state in ["compiled" if case["name"].endswith(COMPILED) else "eager"]
        if case["name"].removesuffix(COMPILED) == OURS and "ratio_to_open_clip" in case
    ]
    against = f"; against open_clip's trainer {', '.join(ratios)}" if ratios else ""
    loop = result["loop"]
    inside = f", {loop['inside']:.2%} looked at from inside" if loop["inside"] is not None else ""
    return f"{told}{against}; the loop adds {loop['overhead']:+.1%} to a bare step{inside}."


def table(result: dict[str, Any]) -> list[str]:
    """The results as lines of text."""
    lines = [
        f"{'step':<26} {'batch':>5} {'ms':>9} {'films/s':>8} {'range':>15} {'to open_clip':>21} {'TFLOP':>7} "
        f"{'of peak':>7} {'memory':>9} {'host ms':>8} {'idle':>6}"
    ]
    for case in result["cases"]:
        if "step_s" not in case:
            lines.append(f"{case['name']:<26} {case['batch_size']:>5} {case['note']}")
            continue
        ratio = case.get("ratio_to_open_clip")
        ratios = f"{ratio:.2f}x {case['ratio_lowest']:.2f} - {case['ratio_highest']:.2f}" if ratio else ""
        spread = f"{case['lowest']:,.0f} - {case['highest']:,.0f}"
        lines.append(
            f"{case['name']:<26} {case['batch_size']:>5} {case['step_s'] * 1e3:9,.1f} {case['images_per_s']:8,.0f} "
            f"{spread:>15} {ratios:>21} {case['flops_per_step'] / 1e12:7.3f} {case['mfu']:7.1%} "
            f"{_or_dash(case['memory_bytes'], lambda value: f'{value / 2**20:,.0f} MiB'):>9} "
            f"{_or_dash(case['host_ms'], lambda value: f'{value:.1f}'):>8} "
            f"{_or_dash(case['idle_share'], lambda value: f'{value:.1%}'):>6}"
        )
    return [*lines, result["verdict"]]


def _or_dash(value: Any, show: Callable[[Any], str]) -> str:
    return "-" if value is None else show(value)
