"""`python -m bench.loader --shards OUT --h5 F --csv F --json F`: every loader that runs here, in turn.

Each round measures every case once, each time in a fresh process (`case`), so that what else the machine does falls on
all alike; ratios are taken within a round, and medians over rounds are reported.
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.case import FLOOR, UINT8_FILE, Task, run_child
from bench.cases import FLOORS, Case, cases
from bench.storage import SlowFileSystem, SlowSettings, evict
from bench.summary import Key, Rounds, summarise, table
from shards.cli import main_guard, parse, say
from shards.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderBenchConfig:
    """Measure films per second of our loader on every backend that runs here, against the per-worker HDF5 baseline,
    loaders of others over the same shards, and peers.

    With --tune instead: search for the loader's settings on this file system; see --tune --help."""

    shards: Path
    """Folder of shards."""
    h5: Path | None = None
    """HDF5 file that the shards were made from; without it there is no baseline and no ratio."""
    csv: tuple[Path, ...] = ()
    """Its CSV files; checked to describe the same rows as the shards, so that nobody compares two data sets."""
    text_column: str = "impression"
    """Column of the reports in the CSV."""
    json: Path | None = None
    """Where the results go, as JSON."""
    batch_size: int = 64
    """Films in a batch."""
    rounds: int = 5
    """Rounds; medians are taken over them."""
    seconds: float = 3.0
    """Measured stretch of each case in each round."""
    warmup_batches: int = 8
    """Batches dropped before it."""
    memory_s: float = 1.0
    """Seconds after it during which memory is sampled; 0: not at all."""
    threads: int | None = None
    """Threads, or worker processes of the baselines; None for one a CPU of the affinity mask."""
    cpus: tuple[int, ...] = ()
    """Numbers of the CPUs to which everything is pinned; none: those that this process may use."""
    floor: bool = False
    """Measure as well: the `cpu` backend's kernels alone, which nothing can beat; `cpu` with libjpeg-turbo instead of
    our decoder; and say where the `cpu` backend's time goes."""
    raw_shards: Path | None = None
    """Shards of the same films with `--encoding raw`, for the `cpu` backend as one more case."""
    uint8: bool = False
    """Measure the HDF5 baselines on a copy of the file as uint8 too."""
    peers: bool = False
    """Measure SPDL, MosaicML Streaming, LitData and FFCV, those that are installed; films are converted for them."""
    peers_path: Path | None = None
    """Folder of packages where peers are looked for too, so that they need not fit this environment."""
    scratch: Path | None = None
    """Folder for converted films; None: a temporary one. For cold runs choose one on the file system of the shards."""
    only: tuple[str, ...] = ()
    """Names of the cases to measure; none: all."""
    cold: bool = False
    """Evict what a case reads from the page cache before each measurement, see that it worked, and time one epoch
    from its first call on, or `seconds` of it."""
    latency_ms: tuple[float, ...] = ()
    """Put a slow file system under every case: each read request waits so long. Several: each in turn."""
    bandwidth_mb: float | None = None
    """And its bandwidth, in 10^6 bytes a second."""
    jitter: float = 0.0
    """And the share by which the latency varies."""
    readahead_kb: int = 1024
    """And what it fetches ahead for a file that is read in order."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "rounds", "warmup_batches"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} is not a positive number")
        if not 0 < self.seconds < math.inf or not 0 <= self.memory_s < math.inf:
            raise InputError(f"--seconds {self.seconds} and --memory-s {self.memory_s} have to be positive numbers")
        if unknown := set(self.cpus) - os.sched_getaffinity(0):
            raise InputError(f"--cpus {min(unknown)}: this process may use {sorted(os.sched_getaffinity(0))}")
        if self.uint8 and not self.h5:
            raise InputError("--uint8 copies the HDF5 file; give it with --h5")
        for _ in self.slow_settings():
            pass

    def slow_settings(self) -> Iterator[SlowSettings | None]:
        """The file systems to measure on; None: as it is."""
        if not self.latency_ms and self.bandwidth_mb is None:
            yield None
        for latency in self.latency_ms or ((0.0,) if self.bandwidth_mb is not None else ()):
            yield SlowSettings(
                latency_ms=latency,
                bandwidth_mb=self.bandwidth_mb,
                jitter=self.jitter,
                readahead_kb=self.readahead_kb,
            )


def run_bench(config: LoaderBenchConfig) -> dict[str, Any]:
    """Measure everything; the result is what `--json` writes."""
    with _pinned(config.cpus), ExitStack() as stack:
        scratch = config.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardclip-bench-")))
        found = run_child(_look(config))
        listed, absent = cases(config, found)
        notes: dict[Key, str] = {(name, None): why for name, why in absent.items()}
        rounds = _measure_all(config, listed, scratch, found["films"], notes)
        rounds |= {key: [] for key in notes if key not in rounds}
        result = _describe(config, found)
        result["cases"] = summarise(listed, rounds, notes)
        if config.floor:
            profiled = [case for case in listed if case.name in FLOORS]
            result["profile"] = {
                case.name: run_child(replace(_task(config, case, scratch, 0), action="profile")) for case in profiled
            }
    return result


def _measure_all(
    config: LoaderBenchConfig, listed: list[Case], scratch: Path, films: int, notes: dict[Key, str]
) -> dict[Key, Rounds]:
    """Rounds of every case and latency. A peer that fails gets a note and no second try; ours have to run."""
    unfit = _convert(config, listed, scratch)
    speeds = list(config.slow_settings())
    rounds: dict[Key, Rounds] = {(case.name, _latency(slow)): [] for slow in speeds for case in listed}
    notes |= {key: unfit[key[0]] for key in rounds if key[0] in unfit}
    for number in range(config.rounds):
        for slow in speeds:
            for case in listed:
                key = case.name, _latency(slow)
                if key in notes:
                    continue
                try:
                    taken = _measure(config, case, scratch, number, slow, films)
                except InputError as error:
                    if not case.peer:
                        raise
                    notes[key] = f"failed: {error}"
                    say(f"{case.name}: {notes[key]}")
                    continue
                rounds[key].append(taken)
                at = "" if slow is None else f"  {slow.latency_ms:g} ms"
                say(f"round {number + 1}/{config.rounds}{at}  {case.name:<18} {taken['images_per_s']:8,.0f} films/s")
    return rounds


def _latency(slow: SlowSettings | None) -> float | None:
    return None if slow is None else slow.latency_ms


def _measure(
    config: LoaderBenchConfig, case: Case, scratch: Path, number: int, slow: SlowSettings | None, films: int
) -> dict[str, Any]:
    task = _task(config, case, scratch, number)
    places = case.places(config, scratch)
    share = evict(places) if config.cold else None
    if config.cold:
        task = replace(task, most_images=films)
    if slow is None:
        taken = run_child(task)
    else:
        with SlowFileSystem(slow, places) as under:
            taken = run_child(replace(task, slow=True), under.environment())
    return taken if share is None else taken | {"resident_share": share}


def _convert(config: LoaderBenchConfig, listed: list[Case], scratch: Path) -> dict[str, str]:
    """Make what cases read that is not there; why, by name, where a peer cannot."""
    unfit: dict[str, str] = {}
    for case in listed:
        folder = scratch if case.uint8 else scratch / case.loader
        made = folder / UINT8_FILE if case.uint8 else folder
        if not case.writes or made.exists():
            continue
        say(f"converting the films for {case.name}")
        folder.mkdir(parents=True, exist_ok=True)
        task = replace(_task(config, case, scratch, 0), action="write", h5=_absolute(config.h5))
        try:
            run_child(task)
        except InputError as error:
            if not case.peer:
                raise
            unfit[case.name] = f"its data could not be made: {error}"
    return unfit


def _task(config: LoaderBenchConfig, case: Case, scratch: Path, seed: int) -> Task:
    return Task(
        loader=case.loader,
        shards=str(_absolute(config.raw_shards if case.raw else config.shards)),
        h5=_absolute(scratch / UINT8_FILE if case.uint8 else config.h5),
        data=str(_absolute(scratch if case.uint8 else scratch / case.loader)),
        peers_path=_absolute(config.peers_path),
        device="cpu" if case.loader == FLOOR else case.device,
        batch_size=config.batch_size,
        threads=config.threads,
        seed=seed,
        own_jpeg=case.own_jpeg,
        warmup_batches=config.warmup_batches,
        seconds=config.seconds,
        memory_s=config.memory_s,
    )


def _look(config: LoaderBenchConfig) -> Task:
    return Task(
        action="look",
        shards=str(_absolute(config.shards)),
        h5=_absolute(config.h5),
        raw_shards=_absolute(config.raw_shards),
        csv=tuple(str(path.resolve()) for path in config.csv),
        text_column=config.text_column,
        peers_path=_absolute(config.peers_path),
    )


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _describe(config: LoaderBenchConfig, found: dict[str, Any]) -> dict[str, Any]:
    """Machine and settings. Last of all: to ask for the GPU's name takes torch."""
    from bench.machine import environment

    places = {"shards": config.shards, "raw_shards": config.raw_shards, "h5": config.h5, "scratch": config.scratch}
    machine = environment({name: path for name, path in places.items() if path is not None})
    settings: dict[str, Any] = {
        name: getattr(config, name) for name in ("batch_size", "rounds", "seconds", "warmup_batches", "cold")
    }
    cpus = sorted(os.sched_getaffinity(0))
    settings |= {"threads": config.threads or len(cpus), "cpus": cpus}
    settings |= {"films": found["films"], "block_rows": found["block_rows"]}
    if any(config.slow_settings()):
        names = ("latency_ms", "bandwidth_mb", "jitter", "readahead_kb")
        settings |= {name: getattr(config, name) for name in names}
    return {"bench": "loader", "environment": machine, "settings": settings}


@contextmanager
def _pinned(cpus: tuple[int, ...]) -> Iterator[None]:
    """This process, and what it starts, on some CPUs only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write JSON; with --tune, `bench.tune` instead."""
    arguments = sys.argv[1:] if argv is None else argv
    if "--tune" in arguments:
        from bench import tune

        return tune.main([each for each in arguments if each != "--tune"])
    with main_guard("bench.loader"):
        config = parse(LoaderBenchConfig, argv, prog="python -m bench.loader")
        from shards.atomic import check_writable, write_atomic

        if config.json:
            check_writable(config.json)
        from bench.machine import one_line

        result = run_bench(config)
        say("\n".join(table(result)))
        say(f"median of {config.rounds} rounds, batch {config.batch_size}, on {one_line(result['environment'])}")
        if config.json:
            write_atomic(config.json, (json.dumps(result, indent=1) + "\n").encode())
            say(f"written to {config.json}")


if __name__ == "__main__":
    main()
