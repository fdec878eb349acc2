"""`python -m bench.loader --shards OUT --h5 F --csv F --json F`: every loader that runs here, in turn.

Each round measures every case once, each time in a fresh process (`case`), so that what else the machine does falls on
all alike; ratios are taken within a round, and medians over rounds are reported.
"""

import itertools
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.case import BASELINE, FLOORS, TUNED, Case, Task, absolute, cases, convert, run_child
from bench.machine import bench_main, check_positive, environment
from bench.processes import pinned
from bench.storage import SlowSettings, evict, slow_file_system
from bench.summary import Key, Rounds, summarise, verdict
from shards.cli import say
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
    dataset: str = "cxr"
    """Path of the dataset in it."""
    csv: tuple[Path, ...] = ()
    """Its CSV files; checked to hold the shards' reports, so that nobody compares two data sets."""
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
    from the call that builds the loader, instead of --seconds of it warm."""
    cold_s: float = 60.0
    """Where a cold measurement ends at the latest; starting processes takes seconds, that an epoch has to outweigh."""
    latency_ms: tuple[float, ...] = ()
    """Put a slow file system under every case: each read request waits so long. Several: each in turn."""
    bandwidth_mb: float | None = None
    """And its bandwidth, in 10^6 bytes a second."""
    jitter: float = 0.0
    """And the share by which the latency varies."""
    readahead_kb: int = 1024
    """And what it fetches ahead for a file that is read in order."""
    together: bool = True
    """End with what the loader costs training, and a verdict: bench.together on the same shards, with the recipe on a
    GPU and `tiny` on a CPU. Left out where --only picks cases, and with --cold."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "rounds", "warmup_batches", "seconds", "cold_s")
        if not 0 <= self.memory_s < math.inf:
            raise InputError(f"--memory-s {self.memory_s} is no time")
        if unknown := set(self.cpus) - os.sched_getaffinity(0):
            raise InputError(f"--cpus {min(unknown)}: this process may use {sorted(os.sched_getaffinity(0))}")
        if self.uint8 and not self.h5:
            raise InputError("--uint8 copies the HDF5 file; give it with --h5")
        if self.jitter and not any(self.latency_ms):
            raise InputError(f"--jitter {self.jitter} is a share of --latency-ms; give that too")
        tuple(self.slow_settings())  # they check themselves

    def slow_settings(self) -> Iterator[SlowSettings | None]:
        """The file systems to measure on; None: as it is."""
        if not self.latency_ms and self.bandwidth_mb is None:
            yield None
        for latency in self.latency_ms or ((0.0,) if self.bandwidth_mb is not None else ()):
            yield SlowSettings(
                latency_ms=latency,
                bandwidth_mb=self.bandwidth_mb,
                jitter=self.jitter if latency else 0.0,
                readahead_kb=self.readahead_kb,
            )


def run_bench(config: LoaderBenchConfig) -> dict[str, Any]:
    with pinned(config.cpus), ExitStack() as stack:
        places = {name: absolute(getattr(config, name)) for name in ("h5", "raw_shards", "peers_path")}
        more: dict[str, Any] = {"dataset": config.dataset, "text_column": config.text_column, **places}
        csv = tuple(str(path.resolve()) for path in config.csv)
        found = run_child(Task(action="look", shards=str(config.shards.resolve()), csv=csv, **more))
        listed, absent = cases(config, found)
        temporary = tempfile.TemporaryDirectory(prefix="shardclip-bench-", ignore_cleanup_errors=True)
        scratch = (config.scratch or Path(stack.enter_context(temporary))) / found["digest"]  # of these films alone
        scratch.mkdir(parents=True, exist_ok=True)
        notes: dict[Key, str] = {(name, None): why for name, why in absent.items()}
        rounds = _measure_all(config, listed, scratch, found["films"], notes)
        rounds |= {key: [] for key in notes if key not in rounds}
        result = _describe(config, found)
        result["cases"] = summarise(listed, rounds, notes)
        result["verdict"] = verdict(result["cases"], result["settings"])
        if config.floor:
            tasks = {case.name: case.task(config, scratch, 0) for case in listed if case.name in FLOORS}
            result["profile"] = {name: run_child(replace(task, action="profile")) for name, task in tasks.items()}
        if config.together and not config.only and not config.cold:
            result["together"] = {_at(slow): _together(config, slow, found) for slow in config.slow_settings()}
    return result


def _together(config: LoaderBenchConfig, slow: SlowSettings | None, found: dict[str, Any]) -> dict[str, Any]:
    """What `bench.together` finds, or why it could not: the rounds before it took minutes."""
    say(f"training on it, {_at(slow)}: live, replayed and resident batches in turn")
    task = Task(
        action="together",
        loader="auto" if found["dali"] else "cpu",
        shards=str(config.shards.resolve()),
        batch_size=config.batch_size,
        threads=config.threads,
        rounds=config.rounds,
        seconds=config.seconds,
    )
    try:
        taken = _run(task, slow, [config.shards])
    except InputError as error:
        return {"failed": str(error)}
    return taken if slow is None else taken | {"settings": taken["settings"] | {"latency_ms": slow.latency_ms}}


def _at(slow: SlowSettings | None) -> str:
    """Of a file system, in words."""
    return "the file system as it is" if slow is None else f"{slow.latency_ms:g} ms a request"


def _run(task: Task, slow: SlowSettings | None, places: list[Path]) -> dict[str, Any]:
    with slow_file_system(slow, places) as variables:
        return run_child(task, variables)


def _measure_all(
    config: LoaderBenchConfig, listed: list[Case], scratch: Path, films: int, notes: dict[Key, str]
) -> dict[Key, Rounds]:
    """Rounds of every case and latency. A peer or DALI that fails gets a note, no second try; others have to run."""
    unfit = convert(config, listed, scratch)
    speeds = [(slow, None if slow is None else slow.latency_ms) for slow in config.slow_settings()]
    rounds: dict[Key, Rounds] = {(case.name, ms): [] for _, ms in speeds for case in listed}
    notes |= {key: unfit[key[0]] for key in rounds if key[0] in unfit}
    for number, (slow, ms), case in itertools.product(range(config.rounds), speeds, listed):
        key = case.name, ms
        if key in notes:
            continue
        try:
            taken = _measure(config, case, scratch, number, slow, films)
        except InputError as error:
            if case.loader in (BASELINE, TUNED):
                raise InputError(f"{case.name}: {error} (without --h5 the others are measured)") from None
            if not case.peer and case.loader != "dali":
                raise
            notes[key] = f"failed: {error}"
            say(f"{case.name}: {notes[key]}")
            continue
        rounds[key].append(taken)
        at = "" if ms is None else f"  {ms:g} ms"
        say(f"round {number + 1}/{config.rounds}{at}  {case.name:<18} {taken['images_per_s']:8,.0f} films/s")
    return rounds


def _measure(
    config: LoaderBenchConfig, case: Case, scratch: Path, number: int, slow: SlowSettings | None, films: int
) -> dict[str, Any]:
    task, places = case.task(config, scratch, number), case.places(config, scratch)
    if not config.cold:
        return _run(task, slow, places)
    share = evict(places)
    return _run(replace(task, most_images=films, seconds=config.cold_s), slow, places) | {"resident_share": share}


def _describe(config: LoaderBenchConfig, found: dict[str, Any]) -> dict[str, Any]:
    """Machine and settings. Last of all: to ask for the GPU's name takes torch."""
    places = {"shards": config.shards, "raw_shards": config.raw_shards, "h5": config.h5, "scratch": config.scratch}
    machine = environment({name: path for name, path in places.items() if path is not None})
    names = ["batch_size", "rounds", "seconds", "warmup_batches", "cold", *(["cold_s"] if config.cold else [])]
    names += ["latency_ms", "bandwidth_mb", "jitter", "readahead_kb"] if any(config.slow_settings()) else []
    cpus = sorted(os.sched_getaffinity(0))
    settings: dict[str, Any] = {name: getattr(config, name) for name in names} | {"cpus": cpus}
    settings |= {"threads": config.threads or len(cpus), "films": found["films"], "block_rows": found["block_rows"]}
    return {"bench": "loader", "environment": machine, "settings": settings}


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if "--tune" in arguments:
        from bench import tune

        return tune.main([each for each in arguments if each != "--tune"])
    bench_main("bench.loader", LoaderBenchConfig, argv, run_bench, _told)


def _told(result: dict[str, Any]) -> Iterator[str]:
    yield from filter(None, [result["verdict"]])
    for at, found in result.get("together", {}).items():
        yield f"On {at}: {found.get('verdict') or 'training was not measured: ' + found['failed']}"


if __name__ == "__main__":
    main()
