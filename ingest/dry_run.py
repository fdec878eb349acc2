"""`--dry-run`: what an ingest would do, from the tables and a few films, with nothing written."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ingest.config import IngestConfig
from ingest.encoding_choice import settle
from ingest.films import Film, FolderFilms, H5Films
from ingest.images import Fault
from ingest.inputs import Inputs, read_inputs
from ingest.report import namesake_lines
from shards.encodings import encode
from shards.schema import NO_GROUP, SAMPLE_OVERHEAD, ImageSpec
from shards.stats import ungrouped_lines

_FILMS = 32
"""Films encoded for the estimate, from the first rows of each source."""


def dry_run(config: IngestConfig) -> Iterator[str]:
    """Lines that say which rows would go where, and what time and disk they would take. InputError as the ingest's."""
    inputs = read_inputs(config)
    several = f" of {len(inputs.sources)} sources" if len(inputs.sources) > 1 else ""
    yield f"{inputs.rows:,} rows{several}, films of {inputs.height} x {inputs.width}"
    for reason, count in Counter(inputs.plan.reasons.values()).most_common():
        yield f"rejected {count:,}: {reason}"
    for split, rows in inputs.plan.order.items():
        first, end = inputs.plan.ranges.get(split, (0, 0))
        yield f"{split:<6} {len(rows):,} rows" + (f" of {end - first:,} patients" if inputs.plan.ranges else "")
    ungrouped = {split: int((inputs.plan.groups[rows] == NO_GROUP).sum()) for split, rows in inputs.plan.order.items()}
    yield from ungrouped_lines(ungrouped)
    yield from namesake_lines(inputs.plan.namesakes)
    config, lines = settle(config, inputs)
    yield from lines
    seconds, size, measured = _try_films(config, inputs)
    if not measured:
        yield f"none of the first {_FILMS} films of each source can be read"
        return
    kept = inputs.rows - len(inputs.plan.reasons)
    final = kept * (size + SAMPLE_OVERHEAD)
    yield f"{config.encoding}: {size:,.0f} bytes and {seconds * 1e3:.2f} ms a film on one core, over {measured} films"
    minutes = inputs.rows * seconds / config.worker_count / 60
    yield (
        f"{f'about {minutes:,.0f} minutes' if minutes >= 1 else 'less than a minute'} with {config.worker_count} "
        f"workers if the files are read as fast as now; {final / 1e9:,.2f} GB of shards, twice that while it runs"
    )
    yield f"{shutil.disk_usage(_existing(config.to_shards)).free / 1e9:,.1f} GB are free there; nothing was written"


def _try_films(config: IngestConfig, inputs: Inputs) -> tuple[float, float, int]:
    """Seconds and bytes a film, and how many films they are the mean of."""
    spec = ImageSpec(height=inputs.height, width=inputs.width, codec=config.encoding, quality=config.quality)
    started = time.perf_counter()
    sizes: list[int] = []
    for source, table in zip(inputs.sources, inputs.tables, strict=True):
        end = min(_FILMS, table.rows)
        if source.images is not None:
            films = FolderFilms(source.images, source.image_size, table.names[:end], 0).read(0, end)
            sizes += _sizes(films, spec)
        else:
            with H5Films(source) as h5:
                first, last = next(h5.ranges(_FILMS))
                sizes += _sizes(h5.read(first, min(last, end)), spec)
    count = len(sizes)
    return (time.perf_counter() - started) / max(count, 1), sum(sizes) / max(count, 1), count


def _sizes(films: Iterator[Film], spec: ImageSpec) -> list[int]:
    return [len(encode(film, spec)) for film in films if not isinstance(film, Fault)]


def _existing(path: Path) -> Path:
    """The folder itself or the nearest one above it that exists."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
