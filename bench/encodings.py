"""`python -m bench.encodings --h5 FILE ... --json F`: what each encoding costs and keeps.

Bytes, CPU time to encode and to decode on one core, and what is lost, over the same films for all encodings, each timed
in every round, one after the other; medians over rounds.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import bench_main, check_positive, environment
from shards import tar
from shards.cli import say
from shards.encodings import ENCODINGS, Pixels, decode, encode, loss, psnr
from shards.errors import InputError
from shards.schema import CODEC_EXTENSIONS, ImageSpec, sample_key

_OTHER_MEMBERS = 2 * 2 * tar.BLOCK
"""Bytes in the tar of a sample's report and labels: two headers, and a block each where they take up to 512 bytes."""


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
    """Measure everything; the result is what `--json` writes."""
    names = config.names or tuple(map(str, range(len(config.h5))))
    inputs = [
        measure(name, read_films(path, config.films), config) for name, path in zip(names, config.h5, strict=True)
    ]
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
    height, width = films[0].shape
    specs = dict(_specs(height, width, config.qualities))
    kept = {label: [encode(film, spec) for film in films] for label, spec in specs.items()}
    times: dict[str, list[dict[str, float]]] = {label: [] for label in specs}
    for number in range(config.rounds):
        for label, spec in specs.items():
            times[label].append(_time(spec, kept[label], films))
        say(f"{name}: round {number + 1}/{config.rounds}")
    rows = [{"name": label, **_summary(spec, kept[label], films, times[label])} for label, spec in specs.items()]
    return {"name": name, "films": len(films), "height": height, "width": width, "encodings": rows}


def _specs(height: int, width: int, qualities: Sequence[int]) -> Iterator[tuple[str, ImageSpec]]:
    for codec in CODEC_EXTENSIONS:
        if ENCODINGS[codec].lossless:
            yield codec, ImageSpec(height=height, width=width, codec=codec)
        else:
            for quality in qualities:
                yield f"{codec} {quality}", ImageSpec(height=height, width=width, codec=codec, quality=quality)


def _time(spec: ImageSpec, contents: Sequence[bytes], films: Sequence[Pixels]) -> dict[str, float]:
    """CPU milliseconds a film: to encode, and to decode."""
    return {
        "encode_ms": _cpu_ms(lambda film: encode(film, spec), films),
        "decode_ms": _cpu_ms(lambda content: decode(content, spec), contents),
    }


def _cpu_ms(work: Callable[[Any], object], items: Sequence[Any]) -> float:
    started = time.process_time()
    for item in items:
        work(item)
    return (time.process_time() - started) / len(items) * 1e3


def _summary(
    spec: ImageSpec, contents: Sequence[bytes], films: Sequence[Pixels], times: list[dict[str, float]]
) -> dict[str, Any]:
    back = [decode(content, spec) for content in contents]
    losses = list(map(loss, films, back))
    mean = {
        field: statistics.fmean(getattr(each, field) for each in losses)
        for field in ("error", "resized_error", "resized_difference")
    }
    member = f"{sample_key(0, 0)}.{spec.extension}"
    return {
        "bytes": statistics.fmean(map(len, contents)),
        "tar_bytes": statistics.fmean(len(tar.member(member, each)) + _OTHER_MEMBERS for each in contents),
        **{field: statistics.median(taken[field] for taken in times) for field in times[0]},
        "psnr": psnr(mean["error"]) if mean["error"] else None,  # JSON has no infinity
        "difference": statistics.fmean(map(_mean_difference, films, back)),
        "resized_psnr": psnr(mean["resized_error"]) if mean["resized_error"] else None,
        "resized_difference": mean["resized_difference"],
        "resized_difference_worst": max(each.resized_difference for each in losses),
        "rounds": times,
    }


def _mean_difference(before: Pixels, after: Pixels) -> float:
    return float(np.abs(before.astype(np.int16) - after).mean())


def main(argv: list[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    bench_main("bench.encodings", EncodingsBenchConfig, argv, run_bench)


if __name__ == "__main__":
    main()
