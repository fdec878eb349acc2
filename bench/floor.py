"""What an ingest cannot do without: reading and encoding, by its own functions, with nothing written."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ingest.config import SourceConfig
from shards.processes import Processes
from shards.schema import ImageSpec

if TYPE_CHECKING:
    from ingest.films import H5File


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """Reading and encoding alone."""

    seconds: float
    cpu_s: float
    films: int


def measure_floor(source: SourceConfig, workers: int, prepare: Callable[[], object]) -> Floor:
    """Read and encode all films in so many processes, started and warm; `prepare` is called before the clock starts."""
    from ingest.films import H5Films
    from ingest.inputs import range_rows

    with H5Films(source) as films:
        spec = ImageSpec(height=films.height, width=films.width)
        tasks = [(source, films.files, spec, *span) for span in films.ranges(range_rows(films.rows))]
        count = films.rows
    with Processes(workers) as pool:
        for _ in pool.map_unordered(read_and_encode, tasks[:1] * workers * 2):  # imports, and the files' first pages
            pass
        prepare()
        started = time.perf_counter()
        cpu_s = sum(pool.map_unordered(read_and_encode, tasks))
        return Floor(seconds=time.perf_counter() - started, cpu_s=cpu_s, films=count)


def read_and_encode(task: tuple[SourceConfig, tuple["H5File", ...], ImageSpec, int, int]) -> float:
    """The floor of one range of rows: CPU seconds."""
    from ingest.films import H5Films
    from ingest.images import Fault
    from shards.encodings import encode

    source, files, spec, first, end = task
    started = time.process_time()
    with H5Films(source, files) as films:
        for film in films.read(first, end, ahead=False):  # one after the other is what the two cost alone
            if not isinstance(film, Fault):
                encode(film, spec)
    return time.process_time() - started
