"""Two runs of the same thing on the same machine: what changed beyond the noise, by the rule that RULE says to readers.

Mann and Whitney's test (1947) assumes nothing of how rounds are spread, and one slow first round does not count for
more than it is. What slows loaders that share no code with ours as well is the machine: they are asked for all
together, as among page caches and worker processes they are far noisier than ours. With rounds drawn from four
recorded runs (tests/test_bench_report.py), a machine slower by 15 or 30 % was called a loss of ours 19
and 13 times in 100 where half of the loss in the ratio to `hdf5-tuned` was asked for alone, 4 and 1 times as it is
here; a loss of ours of 30 % was found 92 times then and is 99 times now. To ask more of the noisy rounds, LEVEL itself,
would hide it.

Loaders of others are shown but are no regression of ours. Fewer than five rounds a side can hardly pass the test: they
are shown as too few to tell.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

from bench.kinds import METRICS, REFERENCES, Case, Metric, Result, ratios

LEVEL, PACED_LEVEL = 0.01, 0.05
_MOST_EXACT = 2_500
"""Pairs of rounds; the exact distribution of more takes long, and the normal one is as good."""
UNTUNED = ("rounds", "seconds", "warmup_batches")
"""Settings that change how well a thing is measured, not what."""
RULE = (
    "A figure is worse where the rounds of the newer run are worse by a one-sided exact Mann-Whitney test (p "
    "< {level:g}) and the medians differ by more than {effect:.0%}; for films/s beside loaders of others the rounds "
    "are divided by the pace of these, which is the machine's: half of the loss or more has to be left, with p "
    "< {paced:g}. Runs on different machines, or with different settings, are not compared."
)

WORSE, BETTER, SAME = "worse", "better", "within the noise"
FEW, MACHINE = "too few rounds to tell", "not ours, or others are slower too"


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
                alike.setdefault(_likeness(result), []).append(result)
        pairs += [compare(runs[-2], runs[-1], min_effect) for runs in alike.values() if len(runs) > 1]
        if len(alike) > 1:
            names = " | ".join("; ".join(run.file for run in runs) for runs in alike.values())
            reason = "machines" if len({runs[0].machine for runs in alike.values()}) > 1 else "settings"
            left.append(f"{kind}: not compared across {reason}: {names}")
    return pairs, left


def _likeness(result: Result) -> tuple:
    """Runs are compared where this is the same."""
    settings = sorted((name, value) for name, value in result.settings.items() if name not in UNTUNED)
    return (result.machine or result.file, tuple(settings))  # of unknown machines no two are the same


def compare(older: Result, newer: Result, min_effect: float) -> Comparison:
    """All figures that both have."""
    then, now = ({case.label: case for case in result.cases} for result in (older, newer))
    both = [(then[name], now[name]) for name in now if name in then]
    beside = [pair for pair in both if _is_of_others(pair[1])]
    changes = tuple(change for pair in both for change in _changes(newer.kind, *pair, beside, min_effect))
    return Comparison(older=older, newer=newer, changes=changes, gone=tuple(name for name in then if name not in now))


Beside = Sequence[tuple[Case, Case]]
"""Loaders of others, older and newer."""


def _changes(kind: str, then: Case, now: Case, beside: Beside, min_effect: float) -> Iterator[Change]:
    for metric in METRICS:
        before, after = then.rounds.get(metric, ()), now.rounds.get(metric, ())
        if not before or not after:
            continue
        verdict, p = judge(before, after, METRICS[metric], min_effect)
        if verdict == WORSE and (_is_of_others(now) or (metric == "images_per_s" and _is_machine(then, now, beside))):
            verdict = MACHINE
        one, two = median(before), median(after)
        yield Change(
            kind=kind,
            case=now.label,
            metric=metric,
            older=one,
            newer=two,
            ratio=two / one if one else float("nan"),
            p=p,
            verdict=verdict,
        )


def _is_of_others(case: Case) -> bool:
    """Whether a case shares no code with ours: what slows it as well is the machine. An ingest's floor is ours."""
    return case.peer or case.name in REFERENCES


def _is_machine(then: Case, now: Case, beside: Beside) -> bool:
    """Whether less than half of a loss of films/s is left, or none for sure, with the machine's pace divided out."""
    before, after = then.rounds["images_per_s"], now.rounds["images_per_s"]
    alike = [pair for pair in beside if pair[1].latency_ms == now.latency_ms]
    paces = _paces(alike, 0, len(before)), _paces(alike, 1, len(after))
    if not all(paces):
        return False
    one, two = (ratios(rates, pace) for rates, pace in zip((before, after), paces, strict=True))
    left = median(two) / median(one)
    return left > (1 + median(after) / median(before)) / 2 or _p(one, two, "less") >= PACED_LEVEL


def _paces(beside: Beside, run: int, rounds: int) -> list[float]:
    """The machine's pace in each round of a run (0: the older): of the loaders of others the median of films/s over
    what each gave in the older run's median; empty where none has so many rounds."""
    usual = [(pair[run].rounds.get("images_per_s", ()), pair[0].median("images_per_s")) for pair in beside]
    paced = [[rate / base for rate in rates] for rates, base in usual if base and len(rates) == rounds]
    return [median(each) for each in zip(*paced, strict=True)]


def judge(before: Sequence[float], after: Sequence[float], metric: Metric, min_effect: float) -> tuple[str, float]:
    """One of WORSE, BETTER, SAME, FEW, and the test's p in the direction of the change."""
    one, two = median(before), median(after)
    grown = two > one
    p = _p(before, after, "greater" if grown else "less")
    if abs(two - one) <= max(min_effect * abs(one), metric.least):
        return SAME, p
    if p >= LEVEL:
        least = 1 / comb(len(before) + len(after), len(before))  # p of no overlap
        return (FEW if least >= LEVEL else SAME), p
    return (BETTER if grown == metric.higher_is_better else WORSE), p


def _p(before: Sequence[float], after: Sequence[float], alternative: str) -> float:
    """Of a one-sided Mann-Whitney test that `after` is "greater" or "less"."""
    from scipy.stats import mannwhitneyu

    # Left to itself scipy takes the normal distribution where rounds are equal, which of 4 against 4 makes p 0.007.
    method = "exact" if len(before) * len(after) <= _MOST_EXACT else "asymptotic"
    return float(mannwhitneyu(after, before, alternative=alternative, method=method).pvalue)
