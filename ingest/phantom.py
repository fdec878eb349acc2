"""`python -m ingest.phantom`: a data set of drawn chest films with reports, laid out as CheXzero writes real ones.

    OUT/cxr.h5        dataset `cxr`, float32 (samples, 320, 320), contiguous, whole numbers 0..255
    OUT/reports.csv   Path, impression, patient, a column per finding: 1 stated, 0 denied, -1 hedged, or empty

For demos and tests: nobody's data, learnable, and the same films for the same seed whatever the worker count.
"""

import contextlib
import csv
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from ingest.phantom_body import Body
from ingest.phantom_canvas import SIZE, Array, Field, Frame, Lines
from ingest.phantom_case import LABELS, Case, make_case, patient_of_film
from ingest.phantom_findings import devices, lung_findings
from ingest.phantom_report import write_report
from shards.atomic import atomic_file, check_writable
from shards.cli import main_guard, parse, say
from shards.errors import InputError
from shards.processes import Processes
from shards.progress import progress

PROG = "python -m ingest.phantom"
DATASET = "cxr"
COLUMNS = ("Path", "impression", "patient", *LABELS)
VERSION = 2
"""Grows whenever the same seed would draw other films or reports. In 1 a pixel of 77 million was another grey level on
another kind of CPU.
"""

_ROW_BYTES = SIZE * SIZE * 4
_CHUNK = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PhantomConfig:
    """A phantom data set to draw."""

    out: Path
    """Folder to write cxr.h5 and reports.csv into."""
    samples: int = 4000
    """Number of films."""
    seed: int = 0
    """Same seed, same films and reports."""
    workers: int | None = None
    """Processes; by default one per CPU this process may use."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"--samples is {self.samples}: at least 1 film")
        if not -(2**63) <= self.seed < 2**63:
            raise InputError(f"--seed is {self.seed}: it has to fit 64 bits")
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers is {self.workers}: at least 1 process")


def make_phantom(config: PhantomConfig) -> None:
    """Draw the data set and write both files, each whole or not at all. A folder that has it already is left alone."""
    images, reports = config.out / "cxr.h5", config.out / "reports.csv"
    if _already_there(images, reports, config):
        return
    check_writable(config.out, folder=True)
    _check_space(config)
    with atomic_file(images) as h5, atomic_file(reports) as file, h5py.File(h5.name, "w", locking=False) as films:
        data = films.create_dataset(DATASET, (config.samples, SIZE, SIZE), np.float32)
        data.attrs.update(_fingerprint(config))
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        table = csv.writer(text, lineterminator="\n")
        table.writerow(COLUMNS)
        with progress("phantom", config.samples, "film", keep=True) as advance:
            for start, (drawn, rows) in zip(range(0, config.samples, _CHUNK), _draw_all(config), strict=True):
                data[start : start + _CHUNK] = drawn
                table.writerows(rows)
                advance(len(rows))
        text.detach()


def _already_there(images: Path, reports: Path, config: PhantomConfig) -> bool:
    """Whether the folder holds this very data set; InputError if it holds another."""
    if not images.exists() and not reports.exists():
        return False
    with contextlib.suppress(OSError, KeyError):
        with h5py.File(images, locking=False) as file:
            if dict(file[DATASET].attrs) == _fingerprint(config) and reports.exists():
                return True
    raise InputError(
        f"{config.out} already holds cxr.h5 or reports.csv, and not this phantom data set: "
        "choose another --out, or delete them"
    )


def _fingerprint(config: PhantomConfig) -> dict[str, int]:
    return {"phantom_version": VERSION, "phantom_seed": config.seed, "phantom_samples": config.samples}


def _check_space(config: PhantomConfig) -> None:
    need, free = config.samples * (_ROW_BYTES + 1024), shutil.disk_usage(config.out).free
    if need > free:
        raise InputError(
            f"{config.out} has {free / 1e6:,.0f} MB free, {config.samples:,} films need {need / 1e6:,.0f} MB: "
            "make room, or draw fewer --samples"
        )


def _draw_all(config: PhantomConfig) -> Iterator[tuple[NDArray[np.uint8], list[list]]]:
    """Draw every chunk on the workers, few ahead of the reader; films and CSV rows of each chunk in order."""
    workers = config.workers or len(os.sched_getaffinity(0))
    patients = patient_of_film(config.samples, config.seed)
    tasks = ((start, patients[start : start + _CHUNK].tolist()) for start in range(0, config.samples, _CHUNK))
    with Processes(workers) as pool:
        yield from pool.map(partial(_draw_chunk, config.seed), tasks)


def _draw_chunk(seed: int, chunk: tuple[int, list[int]]) -> tuple[NDArray[np.uint8], list[list]]:
    """Films from a number on, of these patients, (n, 320, 320), and their CSV rows."""
    start, patients = chunk
    cases = [make_case(seed, start + i, patient) for i, patient in enumerate(patients)]
    films = np.stack([draw_film(case) for case in cases]).astype(np.uint8)
    return films, [_csv_row(case) for case in cases]


def _csv_row(case: Case) -> list[str | int | None]:
    report, patient = write_report(case), case.patient_index
    path = f"phantom/patient{patient:05d}/study{case.index:06d}/view1_frontal.jpg"
    return [path, report.text, f"p{patient:05d}", *(report.labels[label] for label in LABELS)]  # None is written empty


def draw_film(case: Case) -> Array:
    """The film of a case: float32 (320, 320), whole numbers 0..255."""
    body = Body(case)
    density = body.tissue() + body.bones() + lung_findings(body) + devices(body)
    return _develop(density, case)


def _develop(density: Array, case: Case) -> Array:
    """Density to grey levels: beam edge, tone curve, blur, noise, marker, padding, rounding."""
    e, field = case.exposure, Field(case.seed, case.index)
    even = density - 0.5 * (_coarse(density) - 0.75)
    z = (even - e.level + 0.10 * field.smooth(40, 3)) * (1.4 * e.gain)
    grey = 127.5 * (1 + z / np.sqrt(1 + z * z))
    grey = gaussian_filter(grey, e.blur, truncate=2.5) + e.noise * field.grain(41)
    if e.marker:
        grey = np.maximum(grey, 235 * _marker(case))
    edge = round(e.collimation * SIZE)
    across, down = edge + round(e.bars[0] * SIZE), edge + round(e.bars[1] * SIZE)
    film = np.zeros_like(grey)
    film[down : SIZE - down, across : SIZE - across] = grey[down : SIZE - down, across : SIZE - across]
    return np.rint(np.clip(film, 0, 255))


def _coarse(density: Array) -> Array:
    """The density blurred widely, for the dynamic range compression that digital detectors apply."""
    small = np.ascontiguousarray(density.reshape(SIZE // 4, 4, SIZE // 4, 4).mean((1, 3)))
    blurred = Image.fromarray(gaussian_filter(small, 3.5, truncate=2.5))
    return np.asarray(blurred.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def _marker(case: Case) -> Array:
    lines = Lines(Frame(case.exposure))
    x, y = 0.70, case.patient.apex - 0.02
    lines.line([(x, y - 0.05), (x, y + 0.05), (x + 0.05, y + 0.05)], 0.022, 1.0)
    return lines.layer()


def main() -> None:
    """Parse, draw, say where the files are."""
    with main_guard(PROG):
        config = parse(PhantomConfig, prog=PROG)
        make_phantom(config)
        say(f"{config.samples} films: {config.out / 'cxr.h5'}, {config.out / 'reports.csv'}")


if __name__ == "__main__":
    main()
