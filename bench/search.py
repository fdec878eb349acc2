"""The settings that the tuner may choose among, the search (Optuna's TPE over films/s), and what it found measured
again in turn, beside the default and beside itself without each of its choices."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.compare import BETTER, judge
from bench.kinds import METRICS, ratios
from pipeline.batch import World
from pipeline.buffers import memory_for
from pipeline.config import LoaderConfig, available_cpus, stream_count
from pipeline.handles import ShardSet
from pipeline.loader import make_order
from shards.errors import InputError
from shards.manifest import read_manifest

MEMORY_MB = (128, 256, 512, 1024, 2048, 4096)
READ_THREADS = (1, 2, 4, 8, 16, 32, 64)
AHEAD = (1, 2, 4, 8)
MEMORY_SHARE = 4
"""Read-ahead takes at most one part in so many of the machine's memory: ranks and the model need the rest."""

LEAST_GAIN = 0.01
LEAST_ROUNDS = 5
"""Fewer cannot pass the test."""

Choice = dict[str, Any]
"""Setting -> value; settings are fields of LoaderConfig."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """What may be chosen. The first value of each setting is the default."""

    values: dict[str, tuple[Any, ...]]

    @property
    def default(self) -> Choice:
        """What a run has without a loader.toml."""
        return {name: values[0] for name, values in self.values.items()}

    def changed(self, choice: Choice) -> list[str]:
        """The settings in which a choice differs from the default; `own_jpeg` is heeded by the `cpu` backend alone."""
        unheeded = {"own_jpeg"} if choice["backend"] != "cpu" else set()
        return [name for name, value in choice.items() if value != self.values[name][0] and name not in unheeded]


def make_space(base: LoaderConfig, sets: Sequence[Path], *, dali: bool) -> Space:
    """All that this machine and these sets leave open."""
    cpus = available_cpus()
    # Powers of two up to twice the CPUs, and their number itself: waiting for reads costs none.
    threads = sorted({cpus, *(2**power for power in range(cpus.bit_length() + 1) if 2**power <= 2 * cpus)})
    values: dict[str, tuple[Any, ...]] = {
        "backend": ("dali", "cpu") if dali else ("cpu",),
        "threads": _first(base.threads or cpus, threads),
        "memory_mb": _first(base.memory_mb, [size for size in MEMORY_MB if _fits(base, sets, size)]),
        "read_threads": _first(base.read_threads, READ_THREADS),
        "ahead": _first(base.ahead, AHEAD),
    }
    if read_manifest(sets[0]).image.codec == "jpeg":
        values["own_jpeg"] = (True, False)
    if len(sets) > 1:
        values["shards"] = tuple(sets)
    return Space(values=values)


def _first(value: Any, others: Sequence[Any]) -> tuple[Any, ...]:
    return (value, *(other for other in others if other != value))


def _fits(base: LoaderConfig, sets: Sequence[Path], memory_mb: int) -> bool:
    """Whether a memory holds the live blocks of all sets, and is not too much for the machine."""
    memory = memory_mb << 20
    if memory > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MEMORY_SHARE:
        return False
    try:
        for root in sets:
            manifest = read_manifest(root)
            order = make_order(replace(base, shards=root), [manifest], stream_count(base, World()))
            own = ShardSet(root=root, manifest=manifest, shards=manifest.splits[base.split], layout=order.layouts[0])
            memory_for([own], order.live(World()), base.read_threads, memory)
    except InputError:
        return False
    return True


def search(
    space: Space, rate: Callable[[Choice], float], enough: Callable[[int], bool], *, seed: int
) -> list[tuple[Choice, float]]:
    """What was tried, in order, the default first, until so many trials are `enough`.

    TPE (Bergstra et al. 2011) models which values the better trials share; with noise as large as that of a loader it
    gives a candidate, not a result: the caller measures that in turn with the default.
    """
    try:
        import optuna
    except ImportError:
        raise InputError("tuning needs Optuna: pip install -e '.[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(dict.fromkeys(space.values, 0))
    tried: list[tuple[Choice, float]] = []
    while not enough(len(tried)):
        trial = study.ask()
        choice = {name: each[trial.suggest_categorical(name, range(len(each)))] for name, each in space.values.items()}
        tried.append((choice, rate(choice)))
        study.tell(trial, tried[-1][1])
    return tried


def ablate(space: Space, best: Choice, rate: Callable[[Choice], float], seconds: float) -> list[dict[str, Any]]:
    """The best, and the best without each of its choices, in turn: what each choice bought, a row each."""
    changed = space.changed(best)
    if not changed:
        return []
    variants = {"": best} | {name: best | {name: space.default[name]} for name in changed}
    rates = in_turn(variants, rate, seconds)
    rows = []
    for name in changed:
        found = ratios(rates[""], rates[name])
        row = {"setting": name, "default": space.default[name], "chosen": best[name]}
        row |= {"ratio": statistics.median(found), "lowest": min(found), "highest": max(found)}
        rows.append(row | {"kept": is_faster(rates[""], rates[name])})
    return rows


def is_faster(one: list[float], other: list[float]) -> bool:
    """Beyond the noise, by the rule of `bench.compare`, and by LEAST_GAIN."""
    return judge(other, one, METRICS["images_per_s"], LEAST_GAIN)[0] == BETTER


def in_turn(variants: dict[str, Choice], rate: Callable[[Choice], float], seconds: float) -> dict[str, list[float]]:
    """Each variant once a round, so that what else the machine does falls on all alike; LEAST_ROUNDS or more."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    end, rounds = time.monotonic() + seconds, 0
    while rounds < LEAST_ROUNDS or time.monotonic() < end:
        for name, choice in variants.items():
            found[name].append(rate(choice))
        rounds += 1
    return found
