"""`python -m bench.ingest --h5 FILE ... --csv FILE --json F`: what an ingest costs beside reading and encoding.

The floor (`bench.floor`) has as many warm processes as the ingest has workers, and both as many CPUs. Each round
measures both for each file and number of workers, in turn; ratios are taken within a round, medians over rounds. CPU
time stands beside the clock: it tells more where others are at work.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import tyro

from bench.floor import Floor, measure_floor
from bench.machine import bench_main, check_positive, environment
from bench.processes import Run, pinned, run_watched
from bench.sizes import measure_sizes, repeat_csv, store_repeated
from bench.storage import SlowSettings, evict, slow_file_system
from ingest.config import SourceConfig
from shards.cli import say
from shards.errors import InputError

PHASES = ("start", "encode", "assemble", "finish")
"""Start: interpreter, imports, tables, plan, until the first spill is begun. Finish: report and manifest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestBenchConfig:
    """Measure an ingest against reading and encoding alone, with one worker and with several, and its memory."""

    h5: tuple[Path, ...] = ()
    """HDF5 file of films; or several, which hold the same films stored in other ways, each measured by itself; or
    none, for the memory alone."""
    csv: Path | None = None
    """Their CSV file."""
    dataset: str = "cxr"
    """Path of the dataset in the HDF5 files."""
    text_column: str = "impression"
    """Column of the reports."""
    repeat: int = 10
    """The films are taken so many times over, so that starting up does not count for more than it does in earnest."""
    cold: bool = False
    """Store the repeated films as one file, and put it out of memory before each run: what a lab's 190 GB are."""
    slow: Annotated[SlowSettings, tyro.conf.arg(name="")] = field(default_factory=SlowSettings)
    """A slow file system under films, work files and shards."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of workers."""
    rounds: int = 3
    """Rounds; medians are taken over them."""
    memory_gb: tuple[float, ...] = (1, 5)
    """Sizes (10^9 bytes of float32) of made-up inputs for the memory; none to leave that out."""
    out: Path | None = None
    """Folder for what is made on the way, removed afterwards; the system's for temporary files when not given."""
    json: Path | None = None
    """Where the results go, as JSON."""

    def __post_init__(self) -> None:
        check_positive(self, "repeat", "rounds", "workers", "memory_gb")
        if not self.workers:
            raise InputError("--workers names no number")
        if bool(self.h5) != bool(self.csv) or not (self.h5 or self.memory_gb):
            raise InputError("give both --h5 and --csv, or neither and --memory-gb")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One file, one number of workers."""

    source: SourceConfig
    layout: str
    """How the films are stored."""
    workers: int


Rounds = list[tuple[Floor, Run]]


def run_bench(config: IngestBenchConfig) -> dict[str, Any]:
    result: dict[str, Any] = {"bench": "ingest", "environment": environment(), "settings": _settings(config)}
    with tempfile.TemporaryDirectory(prefix="bench-ingest-", dir=config.out) as name:
        folder = Path(name)
        if config.csv:
            table = repeat_csv(config.csv, folder / "reports.csv", config.repeat)
            slow = None if config.slow == SlowSettings() else config.slow
            under = slow_file_system(slow, [folder, *config.h5])
            with under as variables, patch.dict(os.environ, variables):
                taken = _measure_speed(config, table, folder)
            result["cases"] = [_summary(case, rounds) for case, rounds in taken]
            result["scaling"] = list(_scaling(taken))
        if config.memory_gb:
            result["memory"] = measure_sizes(config.memory_gb, folder, max(config.workers))
    return result | {"verdict": verdict(result)}


def _settings(config: IngestBenchConfig) -> dict[str, Any]:
    """Runs are compared where these are the same: what older runs could not be told is there where it is given."""
    settings = {name: getattr(config, name) for name in ("repeat", "rounds", "cold")}
    slow, usual = asdict(config.slow), asdict(SlowSettings())
    given = {name: value for name, value in slow.items() if value != usual[name]}
    return settings | {name: slow[name] for name in ("latency_ms", "bandwidth_mb")} | given


def _measure_speed(config: IngestBenchConfig, table: Path, folder: Path) -> list[tuple[Case, Rounds]]:
    taken: list[tuple[Case, Rounds]] = [(case, []) for case in _cases(config, folder)]
    for number in range(config.rounds):
        for case, rounds in taken:
            prepare = partial(evict, case.source.h5 if config.cold else ())
            with pinned(tuple(sorted(os.sched_getaffinity(0))[: case.workers])):
                floor = measure_floor(case.source, case.workers, prepare)
                prepare()
                run = _measure_ingest(config, case, table, folder / "shards")
            rounds.append((floor, run))
            rates = f"floor {floor.films / floor.seconds:,.0f} films/s, ingest {floor.films / run.seconds:,.0f}"
            say(f"round {number + 1}/{config.rounds}  {case.layout}, workers {case.workers}: {rates}")
    return taken


def _cases(config: IngestBenchConfig, folder: Path) -> Iterator[Case]:
    for number, path in enumerate(config.h5):
        files = (path.resolve(),) * config.repeat
        if config.cold:
            files = (store_repeated(path, config.dataset, config.repeat, folder / f"films-{number}.h5"),)
        source = SourceConfig(h5=files, dataset=config.dataset)
        layout = _layout(source)
        yield from (Case(source=source, layout=layout, workers=workers) for workers in config.workers)


def _layout(source: SourceConfig) -> str:
    """How the films are stored. InputError where they cannot be read."""
    import h5py

    from ingest.source import H5Source

    with H5Source(source.h5[0], source.dataset) as checked, h5py.File(source.h5[0]) as file:
        data = file[source.dataset]
        chunks = f"chunks of {data.chunks[0]}" if data.chunks else "contiguous"
        return f"{checked.dtype} {chunks}" + (f" {data.compression}" if data.compression else "")


def _measure_ingest(config: IngestBenchConfig, case: Case, table: Path, out: Path) -> Run:
    films: list[str | Path] = ["--h5", *case.source.h5, "--dataset", config.dataset]
    reports: list[str | Path] = ["--csv", table, "--text-column", config.text_column]
    looked_for = (out / ".ingest", "*spill*"), (out, "*.tar"), (out, "rejects.csv")
    marks = [lambda at=at, name=name: any(at.glob(name)) for at, name in looked_for]
    try:
        command = ["ingest", "--to-shards", out, *films, *reports, "--workers", str(case.workers)]
        return run_watched(command, marks, memory=False)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _summary(case: Case, rounds: Rounds) -> dict[str, Any]:
    films = rounds[0][0].films
    ratios = [floor.seconds / run.seconds for floor, run in rounds]
    phases = zip(*(map(float.__sub__, [*run.marks, run.seconds], [0.0, *run.marks]) for _, run in rounds), strict=True)
    return {
        "layout": case.layout,
        "workers": case.workers,
        "films": films,
        "floor_films_per_s": median(films / floor.seconds for floor, _ in rounds),
        "ingest_films_per_s": median(films / run.seconds for _, run in rounds),
        "of_floor": median(ratios),
        "of_floor_range": [min(ratios), max(ratios)],
        "of_floor_cpu": median(floor.cpu_s / run.cpu_s for floor, run in rounds),
        "floor_cpu_ms_a_film": median(floor.cpu_s for floor, _ in rounds) / films * 1e3,
        "ingest_cpu_ms_a_film": median(run.cpu_s for _, run in rounds) / films * 1e3,
        "phases_s": {phase: median(seconds) for phase, seconds in zip(PHASES, phases, strict=True)},
        "rounds": [{"floor": asdict(floor), "ingest": asdict(run)} for floor, run in rounds],
    }


def _scaling(taken: list[tuple[Case, Rounds]]) -> Iterator[dict[str, Any]]:
    """From a file's first number of workers to its last: how much faster the ingest is, and how much the floor."""
    for layout in dict.fromkeys(case.layout for case, _ in taken):
        (first, one), *_, (last, many) = [each for each in taken if each[0].layout == layout] * 2
        pairs = list(zip(one, many, strict=True))
        yield {
            "layout": layout,
            "from": first.workers,
            "to": last.workers,
            "ingest": median(before[1].seconds / after[1].seconds for before, after in pairs),
            "floor": median(before[0].seconds / after[0].seconds for before, after in pairs),
        }


def verdict(result: dict[str, Any]) -> str:
    """What the figures mean, in one sentence."""
    told = [
        f"{case['layout']}, {case['workers']} worker{'s' * (case['workers'] > 1)}: {case['ingest_films_per_s']:,.0f} "
        f"films/s, {case['of_floor']:.2f} of reading and encoding alone"
        for case in result.get("cases", [])
    ]
    if "memory" in result:
        told.append(f"at most {max(run['peak'] for run in result['memory']['runs']) / 2**20:,.0f} MiB in memory")
    return f"Ingest: {'; '.join(told)}."


def main(argv: list[str] | None = None) -> None:
    bench_main("bench.ingest", IngestBenchConfig, argv, run_bench)


if __name__ == "__main__":
    main()
