"""Two runs of the same thing on the same machine: what changed beyond the noise.

The rule (`RULE` says it to readers). Rounds are the sample. A figure is worse where

- the newer rounds are worse than the older by a one-sided exact Mann-Whitney test (Mann and Whitney 1947) at LEVEL: no
  assumption on how rounds are spread, and one slow first round does not count for more than it is;
- and the medians differ by more than `min_effect`, and by more than the metric's own least difference;
- and, for films/s, half of the loss or more shows in the ratio to the reference within each round, where one was
  measured beside it: what slows a loader that shares no code with ours is the machine. A test of these ratios would ask
  too much: a reference among page caches and worker processes is far noisier than ours, and hid a loss of 30 %.

The reference itself, and loaders of others, are shown but are no regression of ours. Fewer than five rounds a side can
hardly pass the test: they are shown as too few to tell.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

from bench.kinds import METRICS, REFERENCES, Case, Metric, Result

LEVEL = 0.01
_MOST_EXACT = 2_500
"""Pairs of rounds; the exact distribution of more takes long, and the normal one is as good."""
UNTUNED = ("rounds", "seconds", "warmup_batches")
"""Settings that change how well a thing is measured, not what."""
RULE = (
    "A figure is worse where the rounds of the newer run are worse by a one-sided exact Mann-Whitney test (p "
    "< {level:g}) and the medians differ by more than {effect:.0%}; for films/s beside an HDF5 loader half of the loss "
    "or more has to show in the ratio to it within each round. Runs on different machines, or with different settings, "
    "are not compared."
)

WORSE, BETTER, SAME = "worse", "better", "within the noise"
FEW, MACHINE = "too few rounds to tell", "not ours, or the reference is slower too"


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One figure of one case, older against newer."""

    kind: str
    case: str
    metric: str
    """A key of METRICS."""
    older: float
    """Median."""
    newer: float
    """Median."""
    ratio: float
    """Newer to older."""
    p: float
    """Of the test in the direction of the change."""
    verdict: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A pair of runs."""

    older: Result
    newer: Result
    changes: tuple[Change, ...]
    gone: tuple[str, ...]
    """Cases of the older that the newer does not have."""

    @property
    def regressions(self) -> list[Change]:
        """What is worse."""
        return [change for change in self.changes if change.verdict == WORSE]


def compare_all(results: Sequence[Result], min_effect: float) -> tuple[list[Comparison], list[str]]:
    """Each newest run against the one before it that is like it; and why others were not compared. Oldest first.

    Runs that do not say their settings are none to compare.
    """
    pairs: list[Comparison] = []
    left: list[str] = []
    for kind in dict.fromkeys(result.kind for result in results):
        alike: dict[tuple, list[Result]] = {}
        for result in results:
            if result.kind == kind and result.settings and any(case.rounds for case in result.cases):
                alike.setdefault(likeness(result), []).append(result)
        pairs += [compare(runs[-2], runs[-1], min_effect) for runs in alike.values() if len(runs) > 1]
        if len(alike) > 1:
            left.append(_why(kind, list(alike.values())))
    return pairs, left


def likeness(result: Result) -> tuple:
    """Runs are compared where this is the same."""
    settings = sorted((name, value) for name, value in result.settings.items() if name not in UNTUNED)
    return (result.machine or result.file, tuple(settings))  # of unknown machines no two are the same


def _why(kind: str, groups: list[list[Result]]) -> str:
    names = ["; ".join(run.file for run in runs) for runs in groups]
    machines = len({runs[0].machine for runs in groups}) > 1
    reason = "machines" if machines else "settings"
    return f"{kind}: not compared across {reason}: {' | '.join(names)}"


def compare(older: Result, newer: Result, min_effect: float) -> Comparison:
    """All figures that both have."""
    then, now = ({case.label: case for case in result.cases} for result in (older, newer))
    changes = [change for name in now if name in then for change in _changes(newer, then[name], now[name], min_effect)]
    gone = tuple(name for name in then if name not in now)
    return Comparison(older=older, newer=newer, changes=tuple(changes), gone=gone)


def _changes(result: Result, then: Case, now: Case, min_effect: float) -> Iterator[Change]:
    for metric in METRICS:
        before, after = then.rounds.get(metric, ()), now.rounds.get(metric, ())
        if not before or not after:
            continue
        verdict, p = judge(before, after, METRICS[metric], min_effect)
        if verdict == WORSE and _is_machine(result, metric, then, now):
            verdict = MACHINE
        one, two = median(before), median(after)
        yield Change(
            kind=result.kind,
            case=now.label,
            metric=metric,
            older=one,
            newer=two,
            ratio=two / one if one else float("nan"),
            p=p,
            verdict=verdict,
        )


def _is_machine(result: Result, metric: str, then: Case, now: Case) -> bool:
    """Whether what shares no code with ours is slower as well, by half as much or more. An ingest's floor is ours."""
    if now.name in REFERENCES or now.peer:
        return True
    if metric != "images_per_s" or result.reference not in REFERENCES or not (then.reference and now.reference):
        return False
    left = median(now.rounds[metric]) / median(then.rounds[metric])
    return median(now.reference) / median(then.reference) > (1 + left) / 2


def judge(before: Sequence[float], after: Sequence[float], metric: Metric, min_effect: float) -> tuple[str, float]:
    """One of WORSE, BETTER, SAME, FEW, and the test's p in the direction of the change."""
    from scipy.stats import mannwhitneyu

    one, two = median(before), median(after)
    grown = two > one
    # Left to itself scipy takes the normal distribution where rounds are equal, which of 4 against 4 makes p 0.007.
    method = "exact" if len(before) * len(after) <= _MOST_EXACT else "asymptotic"
    p = float(mannwhitneyu(after, before, alternative="greater" if grown else "less", method=method).pvalue)
    large = abs(two - one) > max(min_effect * abs(one), metric.least)
    if not large:
        return SAME, p
    if p >= LEVEL:
        least = 1 / comb(len(before) + len(after), len(before))  # p of no overlap
        return (FEW if least >= LEVEL else SAME), p
    return (BETTER if grown == metric.higher_is_better else WORSE), p
