"""`python -m bench.encodings --h5 FILE ... --json F`: what each encoding costs and keeps.

Bytes, CPU time to encode and to decode on one core, and what is lost, as `ingest --encoding auto` tries it, over the
same films for all encodings, one after the other in every round; medians over rounds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench.machine import bench_main, check_positive, environment
from ingest.trial import Trial, try_codec
from shards.cli import say
from shards.encodings import ENCODINGS, Pixels, psnr
from shards.errors import InputError
from shards.schema import CODEC_EXTENSIONS
from shards.tar import BLOCK

_IN_TAR = 5 * BLOCK
"""Bytes a film takes in the tar beside its own and padding: three headers, report and labels up to a block each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodingsBenchConfig:
    """Measure every encoding on some films: bytes, time to encode and decode, loss."""

    h5: tuple[Path, ...] = ()
    """HDF5 files of films, a table each; what JPEG loses is told only by films that never were JPEG."""
    names: tuple[str, ...] = ()
    """What to call them in the results, in that order; their numbers when not given."""
    films: int = 1000
    """Films of each, evenly spread; films that show nothing are left out."""
    qualities: tuple[int, ...] = (85, 90, 95, 98)
    """JPEG qualities."""
    rounds: int = 3
    """Rounds; medians are taken over them."""
    json: Path | None = None
    """Where the results go, as JSON."""

    def __post_init__(self) -> None:
        if not self.h5:
            raise InputError("name the files of films with --h5")
        if self.names and len(self.names) != len(self.h5):
            raise InputError(f"--names gives {len(self.names)} names to {len(self.h5)} files")
        check_positive(self, "films", "rounds", "qualities")
        if self.qualities and max(self.qualities) > 100:
            raise InputError(f"--qualities {max(self.qualities)} is not in 1..100")


def run_bench(config: EncodingsBenchConfig) -> dict[str, Any]:
    names = config.names or tuple(map(str, range(len(config.h5))))
    named = zip(names, config.h5, strict=True)
    inputs = [measure(name, read_films(path, config.films), config) for name, path in named]
    settings = {"rounds": config.rounds}
    return {"bench": "encodings", "environment": environment(), "settings": settings, "inputs": inputs}


def read_films(path: Path, wanted: int) -> list[Pixels]:
    """So many films of a file, evenly spread; one that shows nothing is none."""
    from ingest.source import H5Source

    with H5Source(path) as source:
        count = min(source.rows, wanted)
        rows = (number * source.rows // count for number in range(count))
        found = [source.read_uint8(row, row + 1)[0] for row in rows]
    return [film for film in found if film.min() != film.max()]


def measure(name: str, films: Sequence[Pixels], config: EncodingsBenchConfig) -> dict[str, Any]:
    """All encodings of some films, (H, W) each. InputError where there is none."""
    if not films:
        raise InputError(f"input {name}: no film shows anything")
    encodings = dict(_encodings(config.qualities))
    trials: dict[str, list[Trial]] = {label: [] for label in encodings}
    for number in range(config.rounds):
        for label, (codec, quality) in encodings.items():
            trials[label].append(try_codec(codec, films, quality))
        say(f"{name}: round {number + 1}/{config.rounds}")
    height, width = films[0].shape
    rows = [{"name": label, **summary(taken)} for label, taken in trials.items()]
    return {"name": name, "films": len(films), "height": height, "width": width, "encodings": rows}


def _encodings(qualities: Sequence[int]) -> Iterator[tuple[str, tuple[str, int]]]:
    """What each is called, codec and quality."""
    for codec in CODEC_EXTENSIONS:
        for quality in qualities[:1] if ENCODINGS[codec].lossless else qualities:
            yield codec if ENCODINGS[codec].lossless else f"{codec} {quality}", (codec, quality)


def summary(rounds: Sequence[Trial]) -> dict[str, Any]:
    """Of one encoding: bytes and losses, which are the same in all rounds, and medians of the times."""
    trial, resized = rounds[0], fmean(each.resized_error for each in rounds[0].losses)
    times = [{"encode_ms": each.encode_s * 1e3, "decode_ms": each.decode_s * 1e3} for each in rounds]
    lossless = not any(each.error for each in trial.losses)  # JSON has no infinity
    padding = BLOCK / 2 if trial.size % BLOCK else 0  # on average
    return {
        "bytes": trial.size,
        "tar_bytes": trial.size + _IN_TAR + padding,
        **{field: median(each[field] for each in times) for field in times[0]},
        "psnr": None if lossless else trial.psnr,
        "resized_psnr": None if lossless else psnr(resized),
        "resized_difference": trial.difference,
        "resized_difference_worst": trial.worst,
        "rounds": times,
    }


def main(argv: list[str] | None = None) -> None:
    bench_main("bench.encodings", EncodingsBenchConfig, argv, run_bench)


if __name__ == "__main__":
    main()
