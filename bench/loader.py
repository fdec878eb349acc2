"""`python -m bench.loader --shards OUT --h5 F --csv F --json F`: every loader that runs here, in turn.

Each round measures every case once, so that what else the machine does falls on all alike; a ratio to the HDF5 baseline
is taken within a round, and medians over rounds are reported.
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config import LoaderConfig
from shards.cli import main_guard, parse, say
from shards.errors import InputError

BASELINE, TUNED = "hdf5", "hdf5-tuned"
FLOOR = "floor"
FLOORS = {"cpu": "cpu floor", "cpu raw": "cpu raw floor"}
"""Case -> its kernels alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderBenchConfig:
    """Measure films per second of our loader on every backend that runs here, against the per-worker HDF5 baseline."""

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
    threads: int | None = None
    """Threads, or worker processes of the baselines; None for one a CPU of the affinity mask."""
    floor: bool = False
    """Measure as well: the `cpu` backend's kernels alone, which nothing can beat; `cpu` with libjpeg-turbo instead of
    our decoder; and say where the `cpu` backend's time goes."""
    raw_shards: Path | None = None
    """Shards of the same films with `--encoding raw`, for the `cpu` backend as one more case."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "rounds", "warmup_batches"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} is not a positive number")
        if not 0 < self.seconds < math.inf:
            raise InputError(f"--seconds {self.seconds} is not a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One loader on one device."""

    name: str
    backend: str
    """A backend, or FLOOR: the kernels of `cpu` alone."""
    device: str
    raw: bool = False
    """Reads the raw shards."""
    own_jpeg: bool = True
    """See `LoaderConfig`."""


def cases(config: LoaderBenchConfig, *, cuda: bool, dali: bool) -> list[Case]:
    """What runs here: the baselines where there is an HDF5 file, `cpu`, what was asked for, `dali` if installed."""
    device = "cuda" if cuda else "cpu"
    found = [Case(name=name, backend=name, device=device) for name in ("hdf5", "hdf5-tuned") if config.h5]
    found.append(Case(name="cpu", backend="cpu", device=device))
    if config.floor:
        found.append(Case(name="cpu libjpeg-turbo", backend="cpu", device=device, own_jpeg=False))
        found.append(Case(name="cpu floor", backend=FLOOR, device="cpu"))
    if config.raw_shards:
        found.append(Case(name="cpu raw", backend="cpu", device=device, raw=True))
        if config.floor:
            found.append(Case(name="cpu raw floor", backend=FLOOR, device="cpu", raw=True))
    if dali:
        found.append(Case(name=f"dali ({'GPU' if cuda else 'CPU'})", backend="dali", device=device))
    return found


def run_bench(config: LoaderBenchConfig) -> dict[str, Any]:
    """Measure everything; the result is what `--json` writes."""
    import torch

    from bench.environment import environment
    from bench.measure import Round, measure

    check_pairs(config)
    found = cases(config, cuda=torch.cuda.is_available(), dali=_has_dali())
    rounds: dict[str, list[Round]] = {case.name: [] for case in found}
    for number in range(config.rounds):
        for case in found:
            taken = measure(
                _builder(config, case, number),
                warmup_batches=config.warmup_batches,
                seconds=config.seconds,
                device=torch.device(case.device),
            )
            rounds[case.name].append(taken)
            say(f"round {number + 1}/{config.rounds}  {case.name:<18} {taken.images_per_s:8,.0f} films/s")
    settings = {"batch_size": config.batch_size, "rounds": config.rounds, "seconds": config.seconds}
    settings["threads"] = config.threads or environment()["cpus"]
    result = {"environment": environment(), "settings": settings, "cases": [_summary(name, rounds) for name in rounds]}
    if config.floor:
        result["profile"] = {case.name: _profile(config, case) for case in found if case.name in FLOORS}
    return result


def _profile(config: LoaderBenchConfig, case: Case) -> dict[str, float]:
    """CPU microseconds a film: the kernels on one core, and the loader's threads by kind."""
    from bench.kernels import parts, thread_times

    settings = _settings(config, case, 0)
    return parts(settings) | thread_times(settings, config.seconds)


def _summary(name: str, rounds: dict[str, list]) -> dict[str, Any]:
    rates = [taken.images_per_s for taken in rounds[name]]
    result: dict[str, Any] = {
        "name": name,
        "images_per_s": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "first_batch_s": statistics.median(taken.first_batch_s for taken in rounds[name]),
        "rounds": [asdict(taken) for taken in rounds[name]],
    }
    if BASELINE in rounds:
        ratios = _ratios(rates, rounds[BASELINE])
        result |= {
            "ratio_to_hdf5": statistics.median(ratios),
            "ratio_lowest": min(ratios),
            "ratio_highest": max(ratios),
        }
    if TUNED in rounds:
        result["ratio_to_hdf5_tuned"] = statistics.median(_ratios(rates, rounds[TUNED]))
    if FLOORS.get(name) in rounds:
        result["share_of_floor"] = statistics.median(_ratios(rates, rounds[FLOORS[name]]))
    return result


def _ratios(rates: list[float], base: list) -> list[float]:
    """Within each round, so that what else the machine does falls on both."""
    return [rate / taken.images_per_s for rate, taken in zip(rates, base, strict=True)]


def _settings(config: LoaderBenchConfig, case: Case, seed: int) -> LoaderConfig:
    return LoaderConfig(
        shards=config.raw_shards if case.raw and config.raw_shards else config.shards,
        h5=config.h5,
        backend="cpu" if case.backend == FLOOR else case.backend,
        batch_size=config.batch_size,
        threads=config.threads,
        seed=seed,
        own_jpeg=case.own_jpeg,
    )


def _builder(config: LoaderBenchConfig, case: Case, seed: int) -> Callable[[], Any]:
    from pipeline.batch import World
    from pipeline.loader import build_loader

    settings = _settings(config, case, seed)
    if case.backend == FLOOR:
        from bench.kernels import Floor

        return lambda: Floor(settings)
    return lambda: build_loader(settings, World(device=case.device))


def _has_dali() -> bool:
    import importlib.util

    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def check_pairs(config: LoaderBenchConfig) -> None:
    """InputError where the HDF5 or CSV files are not those that the shards were made from, as far as a look tells."""
    from ingest.reports import read_columns
    from ingest.source import H5Source
    from shards.manifest import read_manifest
    from shards.reader import ShardReader

    manifest = read_manifest(config.shards)
    if config.raw_shards:
        raw = read_manifest(config.raw_shards)
        _check_rows(f"{config.raw_shards}", raw.sources[0].rows, manifest.sources[0].rows)
        if raw.image.codec != "raw":
            raise InputError(f"{config.raw_shards} holds {raw.image.codec} images; ingest with --encoding raw")
    if config.h5:
        with H5Source(config.h5) as source:
            _check_rows(f"{config.h5}", source.rows, manifest.sources[0].rows)
    if config.csv:
        texts = read_columns(config.csv, (config.text_column,))[config.text_column]
        _check_rows("the CSV", len(texts), manifest.sources[0].rows)
        info = next(iter(manifest.splits.values()))[0]
        with ShardReader(config.shards, manifest, info) as reader:
            ours, rows = reader.read_text(0), reader.read_rows(0).source_row
        if ours != texts.take(rows).to_pylist():
            raise InputError(
                f"the reports of {info.name} are not those of the CSV; give the files the shards were made from"
            )


def _check_rows(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise InputError(
            f"{what} has {found:,} rows, the shards were made from {expected:,}; give the files they were made from"
        )


def table(result: dict[str, Any]) -> list[str]:
    """The results as lines of text."""
    lines = [
        f"{'loader':<18} {'films/s':>9} {'range':>15} {'to hdf5':>8} {'range':>13} {'to tuned':>8} {'of floor':>8} "
        f"{'first batch':>12}"
    ]
    for case in result["cases"]:
        ratio, tuned, share = (case.get(name) for name in ("ratio_to_hdf5", "ratio_to_hdf5_tuned", "share_of_floor"))
        ratios = f"{ratio:7.2f}x {case['ratio_lowest']:5.2f} - {case['ratio_highest']:5.2f}" if ratio else ""
        others = f"{f'{tuned:.2f}x' if tuned else '':>8} {f'{share:.2f}' if share else '':>8}"
        spread = f"{case['lowest']:,.0f} - {case['highest']:,.0f}"
        rate = f"{case['images_per_s']:9,.0f} {spread:>15}"
        lines.append(f"{case['name']:<18} {rate} {ratios:>22} {others} {case['first_batch_s']:10.2f} s")
    for name, spent in result.get("profile", {}).items():
        times = ", ".join(f"{part.removesuffix('_us').replace('_', ' + ')} {us:.0f}" for part, us in spent.items())
        lines.append(f"{name}: CPU microseconds a film, kernels alone, then the loader's threads: {times}")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    with main_guard("bench.loader"):
        config = parse(LoaderBenchConfig, argv, prog="python -m bench.loader")
        from shards.atomic import check_writable, write_atomic

        if config.json:
            check_writable(config.json)
        from bench.environment import one_line

        result = run_bench(config)
        say("\n".join(table(result)))
        say(f"median of {config.rounds} rounds, batch {config.batch_size}, on {one_line(result['environment'])}")
        if config.json:
            write_atomic(config.json, (json.dumps(result, indent=1) + "\n").encode())
            say(f"written to {config.json}")


if __name__ == "__main__":
    main()
