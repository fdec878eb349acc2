"""`python -m bench.loader --tune --shards DIR --out loader.toml`: which settings suit this machine and file system.

    search (Optuna) -> the best beside the default, and beside itself without each of its choices, in turn
        -> the choices that bought something -> they alone beside the default, in turn -> loader.toml

A choice is kept where the rounds with it are faster than those without by the rule of `bench.compare`, and by 1 % or
more: a search among noisy figures always finds a winner. What buys nothing stays at its default. Only settings that
change no sample are tried, and several --shards if they are given.

Run it with the CPUs that one rank of the job will have (`srun -c 8`, `taskset`). On a GPU node decoding on the GPU wins
here by what it takes from the training step, which `bench.together` shows.
"""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from bench.kinds import ratios, speed, spread
from bench.machine import bench_main, check_positive, environment, has_dali, one_line
from bench.page import to_text
from bench.search import LEAST_ROUNDS, Choice, Space, ablate, in_turn, is_faster, make_space, search
from bench.storage import SlowSettings, counts, slow_file_system
from bench.tables import tune_tables
from pipeline.config import LoaderConfig
from shards.cli import say
from shards.manifest import read_manifest

PROG = "bench.loader --tune"
LEAST_TRIALS = 10
"""Of the search, the default among them."""
WARMUP_BATCHES = 4
DEFAULT, TUNED = "default", "tuned"


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """Search for the loader's settings on this file system, and write them for `train.main --loader-config`."""

    shards: tuple[Path, ...]
    """Folder of shards. Several, of the same films in other blocks or encodings: which is read fastest is said."""
    out: Path = Path("loader.toml")
    """Where the settings go."""
    json: Path | None = None
    """Where all that was measured goes, as JSON."""
    minutes: float = 5.0
    """Time to spend. Ten trials and five rounds of what they found are made even where that takes longer."""
    batch_size: int = 64
    """Films in a batch."""
    seconds: float = 2.0
    """Measured stretch of each trial."""
    cold: bool = False
    """Put the shards out of the page cache before each trial; see bench/storage.py."""
    seed: int = 0
    """Seed of the search; the trials read the set in other orders each."""
    slow: Annotated[SlowSettings, tyro.conf.arg(name="")] = field(default_factory=SlowSettings)
    """A slow file system under it, to see what would be chosen there."""

    def __post_init__(self) -> None:
        check_positive(self, "minutes", "seconds", "batch_size")


def run_tune(config: TuneConfig) -> dict[str, Any]:
    """Search, compare, decide; the result is what `--json` writes."""
    import torch

    cuda = torch.cuda.is_available()
    backend = "dali" if cuda and has_dali() else "cpu"
    base = LoaderConfig(shards=config.shards[0], batch_size=config.batch_size, backend=backend)
    space = make_space(base, config.shards, dali=backend == "dali")
    rate = _rater(config, base, "cuda" if cuda else "cpu")
    begin = time.monotonic()
    tried = search(space, rate, _enough(space, begin, config.minutes * 60), seed=config.seed)
    best = max(tried, key=lambda trial: trial[1])[0]
    left = max(0.0, config.minutes * 60 - (time.monotonic() - begin))
    bought = ablate(space, best, rate, left / 2)
    chosen = space.default | {each["setting"]: each["chosen"] for each in bought if each["kept"]}
    final = in_turn({DEFAULT: space.default, TUNED: chosen}, rate, left / 2)
    cases = [_case(DEFAULT, space.default, final[DEFAULT]), _case(TUNED, chosen, final[TUNED])]
    if not is_faster(final[TUNED], final[DEFAULT]):
        chosen = space.default
    kept = _plain({name: chosen[name] for name in space.changed(chosen)})
    names = ("batch_size", "seconds", "minutes", "cold")
    settings = {name: getattr(config, name) for name in names} | {"sets": len(config.shards)}
    return {
        "bench": "tune",
        "environment": environment({"shards": config.shards[0]}),
        "settings": settings | (asdict(config.slow) if counts() else {}),
        "cases": cases,
        "choices": [_plain(each) for each in bought],
        "chosen": kept,
        "trials": [{"films_per_s": found, **_plain(choice)} for choice, found in tried],
        "verdict": _where(config.slow) + _verdict(kept, final),
    }


def _enough(space: Space, begin: float, seconds: float) -> Callable[[int], bool]:
    """Whether after so many trials it is time to measure in turn, which takes as long a trial as the search did."""

    def enough(trials: int) -> bool:
        passed = time.monotonic() - begin
        in_turn = LEAST_ROUNDS * (len(space.values) + 3) * passed / max(trials, 1)
        return trials >= LEAST_TRIALS and passed + in_turn > seconds

    return enough


def _rater(config: TuneConfig, base: LoaderConfig, device: str) -> Callable[[Choice], float]:
    """Measures a choice: films/s, each time in another order: blocks in a cache are not those that come first.

    And once the read-ahead is level: a large one takes long to fill, and empties as fast as memory gives; but from an
    empty page cache at once, which only the first stretch finds.
    """
    from bench.measure import forget_rows, measure
    from bench.storage import evict
    from pipeline.batch import World
    from pipeline.loader import build_loader

    if counts() is not None:
        forget_rows()
    orders = itertools.count(1)

    def rate(choice: Choice) -> float:
        settings = replace(base, **choice, seed=next(orders))
        tars = read_manifest(settings.shards).splits[settings.split]
        film_bytes = sum(info.tar.bytes for info in tars) / sum(info.rows for info in tars)
        if config.cold:
            evict([settings.shards])
        found = measure(
            lambda: build_loader(settings, World(device=device)),
            warmup_batches=WARMUP_BATCHES,
            seconds=config.seconds,
            device=device,
            held=None if config.cold else lambda loader: loader.stats()["held_bytes"] / film_bytes,
        )
        return found.images_per_s

    return rate


def _case(name: str, choice: Choice, rates: list[float]) -> dict[str, Any]:
    rounds = [{"images_per_s": rate} for rate in rates]
    return {"name": name, **speed(rates), "choice": _plain(choice), "rounds": rounds}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """For JSON: a set is named by its folder."""
    return {name: value.name if isinstance(value, Path) else value for name, value in values.items()}


def _where(slow: SlowSettings) -> str:
    """So that nobody takes for real storage what was found on a simulated one; "" where it is as it is."""
    if counts() is None:
        return ""
    bandwidth = "" if slow.bandwidth_mb is None else f" and {slow.bandwidth_mb:g} MB/s"
    return f"Simulated, {slow.latency_ms:g} ms a request{bandwidth}: "


def _verdict(kept: Choice, rates: dict[str, list[float]]) -> str:
    if not kept:
        return "Tuning bought no more than the noise: the defaults suit this machine and file system."
    said = ", ".join(f"{name} {value}" for name, value in kept.items())
    return f"Tuned, the loader is {spread(ratios(rates[TUNED], rates[DEFAULT]))} as fast as with the defaults: {said}."


def toml_of(result: dict[str, Any]) -> str:
    """What `train.main --loader-config` takes."""
    from train.commandline import to_toml

    chosen = dict(result["chosen"])
    shards = chosen.pop("shards", None)
    machine = result["environment"]
    comments = [f"by python -m {PROG}, {machine['time']}", f"on {one_line(machine)}", result["verdict"]]
    comments += [line for table in tune_tables(result) if table.rows for line in to_text(table) if line]
    if shards is not None:
        comments.append(f"the fastest set was {shards}: give it as --shards")
    return to_toml(chosen.pop("backend", "auto"), chosen, comments)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    bench_main(PROG, TuneConfig, arguments, partial(_tune, arguments))


def _tune(arguments: list[str], config: TuneConfig) -> dict[str, Any]:
    from shards.atomic import check_writable, write_atomic

    check_writable(config.out)
    if config.slow != SlowSettings() and counts() is None:  # the same in a process with the slow file system under it
        with slow_file_system(config.slow, config.shards) as slow:
            command = [sys.executable, "-m", "bench.tune", *arguments]
            raise SystemExit(subprocess.run(command, env=os.environ | slow).returncode)
    result = run_tune(config)
    write_atomic(config.out, toml_of(result).encode())
    rates = [trial["films_per_s"] for trial in result["trials"]]
    tried = f"{len(rates)} trials of {min(rates):,.0f} to {max(rates):,.0f} films/s, the defaults {rates[0]:,.0f}"
    say(f"{tried}; settings for train.main --loader-config written to {config.out}")
    return result


if __name__ == "__main__":
    main()
