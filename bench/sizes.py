"""Memory of an ingest against the size of its input: made-up HDF5 files of any declared size, made in seconds.

A few films are compressed once and then stored again and again, so that 50 GB of float32 take a few hundred MB. Reading
it is real work: every chunk is decompressed and checked. No two films, reports or patients are alike: the first pixels
of a film hold its number, in deflate blocks of their own (RFC 1951, "stored"), which cost no compression.
"""

import csv
import os
import shutil
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.processes import run_watched
from shards.cli import say
from shards.errors import InputError

SIDE, CHUNK_ROWS = 320, 32
_CHUNKS = 4
"""Of different films."""
_SENTENCES = (
    "The heart is normal in size and the mediastinal contours are stable.",
    "Small left pleural effusion with adjacent atelectasis, unchanged since the prior study.",
    "No focal consolidation, effusion or pneumothorax.",
    "Mild pulmonary vascular congestion without overt oedema.",
    "Endotracheal tube ends 4 cm above the carina; right internal jugular line in the superior vena cava.",
    "Low lung volumes accentuate the bronchovascular markings.",
    "Degenerative changes of the thoracic spine.",
)


def measure_sizes(sizes: tuple[float, ...], folder: Path, workers: int) -> dict[str, Any]:
    """An ingest of each size. Workers hold a shard's worth; what grows with the films is the parent, by its slope."""
    runs = [_measure(gigabytes, folder / "size", workers) for gigabytes in sizes]
    result: dict[str, Any] = {"workers": workers, "runs": runs}
    if len(runs) > 1:
        films = [run["films"] for run in runs]
        for name, of in (("bytes_a_film", "peak"), ("parent_bytes_a_film", "parent")):
            result[name] = float(np.polyfit(films, [run[of] for run in runs], 1)[0])
    return result


def _measure(gigabytes: float, folder: Path, workers: int) -> dict[str, Any]:
    """Of one ingest: what it read, how long it took, bytes (PSS) of all processes at the worst moment, and of each."""
    films = max(round(gigabytes * 1e9 / (SIDE * SIDE * 4)), CHUNK_ROWS)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        h5, table = write_films(folder / "films.h5", films), write_reports(folder / "reports.csv", films)
        command = ["ingest", "--to-shards", folder / "out", "--h5", h5, "--csv", table, "--workers", str(workers)]
        command += ["--label-columns", "Effusion", "Oedema", "--group-column", "patient", "--val-fraction", "0.05"]
        run = run_watched(command, memory=True)
        size = h5.stat().st_size
    finally:
        shutil.rmtree(folder)
    say(f"{gigabytes:g} GB: {run.peak.total / 2**20:.0f} MiB, {run.seconds:.0f} s")
    sizes = {"peak": run.peak.total, "parent": run.peak.parent, "children": run.peak.children}
    return {"gigabytes": gigabytes, "films": films, "file_bytes": size, "seconds": run.seconds, **sizes}


def write_films(path: Path, films: int) -> Path:
    """(films, 320, 320) float32, 32 films or more, in chunks of 32, gzip; no two alike."""
    import h5py

    segments = [_Segment.of(film) for number in range(_CHUNKS) for film in _soft_films(number)]
    with h5py.File(path, "w") as file:
        data = file.create_dataset(
            "cxr", (films, SIDE, SIDE), "f4", chunks=(CHUNK_ROWS, SIDE, SIDE), compression="gzip"
        )
        for first in range(0, films, CHUNK_ROWS):
            rows = range(first, first + CHUNK_ROWS)
            chunk = _chunk([(row, segments[row % len(segments)]) for row in rows])
            data.id.write_direct_chunk((first, 0, 0), chunk)
    return path


_NUMBER_PIXELS = 4
_HEADER, _LAST_BLOCK = b"\x78\x9c", b"\x01\0\0\xff\xff"
"""RFC 1950's two bytes, and an empty block that is the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Segment:
    """A film but for the pixels that hold its number: compressed, to be put behind anything."""

    content: bytes
    adler: int
    size: int
    """Bytes before compression."""

    @classmethod
    def of(cls, film: NDArray[np.float32]) -> "_Segment":
        rest = film.reshape(-1)[_NUMBER_PIXELS:].tobytes()
        deflate = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
        content = deflate.compress(rest) + deflate.flush(zlib.Z_FULL_FLUSH)
        return cls(content=content, adler=zlib.adler32(rest), size=len(rest))


def _chunk(films: list[tuple[int, _Segment]]) -> bytes:
    """A zlib stream of films, each behind its number."""
    parts, adler = [_HEADER], 1
    for row, segment in films:
        number = np.frombuffer(row.to_bytes(_NUMBER_PIXELS, "big"), dtype=np.uint8).astype("<f4").tobytes()
        parts += [b"\0", struct.pack("<HH", len(number), len(number) ^ 0xFFFF), number, segment.content]
        adler = _join_adler(zlib.adler32(number, adler), segment.adler, segment.size)
    return b"".join([*parts, _LAST_BLOCK, struct.pack(">I", adler)])


def _join_adler(first: int, second: int, size: int) -> int:
    """Adler-32 of two pieces of which the second, of `size` bytes, has been summed by itself (RFC 1950)."""
    low = ((first & 0xFFFF) + (second & 0xFFFF) - 1) % 65521
    high = ((first >> 16) + (second >> 16) + size * ((first & 0xFFFF) - 1)) % 65521
    return high << 16 | low


def _soft_films(seed: int) -> NDArray[np.float32]:
    """(32, 320, 320) grey levels: a bright and a dark blob on a slope, whole numbers, cheap to compress."""
    centres = np.random.default_rng(seed).uniform(60, 260, (2, 2, CHUNK_ROWS, 1, 1))
    row, column = np.indices((SIDE, SIDE), dtype=np.float64)
    bright, dark = (np.exp(-((row - y) ** 2 + (column - x) ** 2) / 5000) for y, x in centres)
    return np.rint(90 + row / 8 + 110 * bright - 80 * dark).clip(0, 255).astype(np.float32)


def write_reports(path: Path, rows: int) -> Path:
    """A CSV with a report of some 250 characters for each film, none like another, two labels, a patient for three."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["impression", "patient", "Effusion", "Oedema"])
        for row in range(rows):
            found = [_SENTENCES[(row // 7**place + place) % 7] for place in range(3)]
            writer.writerow([f"Study {row}. {' '.join(found)}", f"P{row // 3:08d}", row % 2, ("", 1, 0, -1)[row % 4]])
    return path


def store_repeated(path: Path, dataset: str, times: int, target: Path) -> Path:
    """The films of an HDF5 file so many times over in one file, stored as they were."""
    import h5py

    with h5py.File(path) as source, h5py.File(target, "w") as file:
        data = source[dataset]
        kept = {name: getattr(data, name) for name in ("chunks", "compression", "compression_opts", "shuffle")}
        made = file.create_dataset(dataset, (times * len(data), *data.shape[1:]), data.dtype, **kept)
        step = data.chunks[0] if data.chunks else 64
        for first in range(0, len(data), step):
            films = data[first : first + step]
            for start in range(first, len(made), len(data)):
                made[start : start + len(films)] = films
    return target


def store_from_shards(shards: Path, target: Path) -> Path:
    """The float32 file that shards could have been made from, as far as JPEG kept it; what they lack is black."""
    import h5py

    from shards.encodings import decode_image
    from shards.manifest import read_manifest
    from shards.scan import read_image, read_samples

    manifest, columns = read_manifest(shards), ("key", "row", "offset", "size", "xxh3")
    with h5py.File(target, "w") as file:
        shape = manifest.sources[0].rows, manifest.image.height, manifest.image.width
        films = file.create_dataset("cxr", shape, "f4")
        for split in manifest.splits:
            for reader, row in read_samples(shards, manifest, split, np.arange(manifest.rows(split)), columns):
                films[row["row"]] = decode_image(read_image(reader, row), manifest.image)
    return target


def repeat_csv(path: Path, target: Path, times: int) -> Path:
    """The rows of a CSV file so many times over."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = csv.reader(file)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error})") from None
    with open(target, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows * times])
    return target


def write_uint8(source: Path, dataset: str, target: Path) -> None:
    """The film dataset once more, contiguous, a quarter of the bytes. InputError where levels are not whole."""
    import h5py

    from ingest.source import H5Source

    with H5Source(source, dataset) as films, h5py.File(target, "w") as file:
        out = file.create_dataset("cxr", (films.rows, films.height, films.width), "u1")
        for first in range(0, films.rows, 256):
            levels = films.read(first, min(first + 256, films.rows))
            grey = levels.astype(np.uint8)
            if (grey != levels).any():
                raise InputError(f"{source} is not in whole grey levels 0..255; measure without --uint8")
            try:
                out[first : first + len(grey)] = grey
            except OSError as error:  # HDF5 says it in ten lines
                reason = os.strerror(error.errno) if error.errno else "HDF5 cannot write it"
                raise InputError(f"no room for the films as uint8 ({reason}); give another --scratch") from None
