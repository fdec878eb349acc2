"""Films tried before an ingest: `--dry-run` says what it would take, `--encoding auto` what it had better write.

`auto` tries every codec on a few films and picks one by a rule. The rule looks at bytes and pixels only,
never at the clock, and the films tried are fixed: the same input gives the same shards on every machine.

1. The lossless codec: the fewest bytes, which count for more where decoding them costs more in every epoch (one EPYC
   core, a 320 px film: raw nothing, png and webp 1.1 ms, jpeg2k 6 ms) or encoding them once (png 2, webp 13 ms).
2. JPEG, if what it loses does not matter and it saves a quarter or more. A film was rounded to whole grey levels when
   it was made and is again when it is resized; one rounding moves a pixel by half a level at most. So JPEG may move the
   resized pixels by half a level on average, and those of no film by more than one. Quality 95 does so by 0.4 on films.
"""

import dataclasses
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ingest.config import IngestConfig
from ingest.encode import blank
from ingest.films import open_films
from ingest.fingerprint import fingerprint
from ingest.images import Fault
from ingest.inputs import Inputs, read_inputs
from ingest.report import warnings
from ingest.workdir import goes_on
from shards.encodings import Loss, Pixels, decode, encode, loss, psnr
from shards.errors import InputError
from shards.schema import NO_GROUP, SAMPLE_OVERHEAD, ImageSpec
from shards.stats import ungrouped_lines

FILMS = 48
"""Films tried, spread evenly over the rows of all sources that have a report."""
LOSSLESS = {"raw": 1.0, "png": 1.1, "webp": 1.15, "jpeg2k": 1.5}
"""Codec -> what a byte of it counts."""
JPEG_SHARE = 0.75
"""The share of the lossless pick's bytes that JPEG may take at most."""
MEAN_DIFFERENCE, FILM_DIFFERENCE = 0.5, 1.0
"""Grey levels by which JPEG may move the resized pixels: on average over all films, and over any one of them."""
_TIMED = 32
"""Films encoded for the estimate, from the first rows of each source."""


def dry_run(config: IngestConfig) -> Iterator[str]:
    """Lines that say which rows would go where, and what time and disk they would take. InputError as the ingest's."""
    begun = fingerprint(config)
    inputs = read_inputs(config)
    config, tried = settle(config, inputs)
    if goes_on(config, begun):
        where = f"{config.to_shards} holds this same ingest, unfinished"
        yield f"{where}, and it would go on, if it is not at work just now; what follows is of all"
    yield from inputs.notes
    several = f" of {len(inputs.sources)} sources" if len(inputs.sources) > 1 else ""
    yield f"{inputs.rows:,} rows{several}, films of {inputs.height} x {inputs.width}"
    for reason, count in Counter(inputs.plan.reasons.values()).most_common():
        yield f"rejected {count:,}: {reason}"
    for split, rows in inputs.plan.order.items():
        first, end = inputs.plan.ranges.get(split, (0, 0))
        yield f"{split:<6} {len(rows):,} rows" + (f" of {end - first:,} patients" if inputs.plan.ranges else "")
    ungrouped = {split: int((inputs.plan.groups[rows] == NO_GROUP).sum()) for split, rows in inputs.plan.order.items()}
    yield from ungrouped_lines(ungrouped)
    usual = np.isnan(inputs.labels) | np.isin(inputs.labels, (1, 0, -1))
    graded = [name for name, column in zip(inputs.label_names, usual.T, strict=True) if not column.all()]
    yield from warnings(inputs.plan.namesakes, inputs.plan.unnamed, graded)
    yield from tried
    seconds, size, measured, faults = _try_films(config, inputs)
    for fault, count in faults.most_common():
        yield f"{count} of {measured + faults.total()} films tried will be rejected: {fault.reason}"
    if not measured:
        yield f"none of the first {_TIMED} films of each source can be read and shows anything"
        return
    kept = inputs.rows - len(inputs.plan.reasons)
    final = kept * (size + SAMPLE_OVERHEAD)
    yield f"{config.encoding}: {size:,.0f} bytes and {seconds * 1e3:.2f} ms a film on one core, over {measured} films"
    minutes = inputs.rows * seconds / config.worker_count / 60
    yield (
        f"{f'about {minutes:,.0f} minutes' if minutes >= 1 else 'less than a minute'} with {config.worker_count} "
        f"workers if the files are read as fast as now; {final / 1e6:,.0f} MB of shards, twice that while it runs"
    )
    free = shutil.disk_usage(_existing(config.to_shards)).free
    enough = "" if free > 2 * final else ", which is TOO LITTLE"
    yield f"{free / 1e6:,.0f} MB are free there{enough}; nothing was written"


def _try_films(config: IngestConfig, inputs: Inputs) -> tuple[float, float, int, Counter[Fault]]:
    """Seconds and bytes a film, how many films they are the mean of, and what is wrong with the others tried."""
    spec = ImageSpec(height=inputs.height, width=inputs.width, codec=config.encoding, quality=config.quality)
    started = time.perf_counter()
    sizes, faults = list[int](), Counter[Fault]()
    for number, (source, table) in enumerate(zip(inputs.sources, inputs.tables, strict=True)):
        with open_films(source, inputs.files[number], table.names) as films:
            for film in films.read(0, min(_TIMED, table.rows, *(file.rows for file in inputs.files[number][:1]))):
                if isinstance(film, Fault):
                    faults[film] += 1
                elif not source.allow_blank and (shows := blank(film)):
                    faults[shows] += 1
                else:
                    sizes.append(len(encode(film, spec)))
    count = len(sizes)
    return (time.perf_counter() - started) / max(count, 1), sum(sizes) / max(count, 1), count, faults


def _existing(path: Path) -> Path:
    """The folder itself or the nearest one above it that exists."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What one codec made of the films tried."""

    codec: str
    size: float
    """Bytes a film."""
    encode_s: float
    decode_s: float
    """CPU seconds a film, on this machine now: told, never looked at."""
    losses: tuple[Loss, ...]
    """One a film."""

    @property
    def psnr(self) -> float:
        """dB over all films, for a peak of 255."""
        return psnr(sum(each.error for each in self.losses) / len(self.losses))

    @property
    def difference(self) -> float:
        """Mean absolute difference after the resize, grey levels."""
        return sum(each.resized_difference for each in self.losses) / len(self.losses)

    @property
    def worst(self) -> float:
        """The same of the film that has most of it."""
        return max(each.resized_difference for each in self.losses)


def settle(config: IngestConfig, inputs: Inputs) -> tuple[IngestConfig, list[str]]:
    """The config with a codec in the place of `auto`, and lines that explain it; none where there was no `auto`."""
    if config.encoding != "auto":
        return config, []
    films = list(sample(inputs))
    if not films:
        raise InputError(
            f"none of {FILMS} films tried for --encoding auto shows anything; name an encoding, or mend them"
        )
    trials = {codec: try_codec(codec, films, config.quality) for codec in ("jpeg", *LOSSLESS)}
    codec, reason = pick(trials)
    lines = [*_table(trials, len(films)), f"--encoding auto takes {codec}: {reason}"]
    return dataclasses.replace(config, encoding=codec), lines  # type: ignore[arg-type]  # one of those it lists


def sample(inputs: Inputs) -> Iterator[Pixels]:
    """The films tried: always the same rows; those that cannot be read or show nothing are left out."""
    kept = np.ones(inputs.rows, dtype=bool)
    kept[list(inputs.plan.reasons)] = False
    rows = np.flatnonzero(kept)
    count = min(FILMS, len(rows))
    chosen = rows[np.arange(count) * len(rows) // count]
    starts = inputs.starts
    for number in range(len(inputs.sources)):
        here = chosen[(starts[number] <= chosen) & (chosen < starts[number + 1])] - starts[number]
        with open_films(inputs.sources[number], inputs.files[number], inputs.tables[number].names) as source:
            for film in (film for row in here.tolist() for film in source.read(row, row + 1)):
                if not isinstance(film, Fault) and blank(film) is Fault.NONE:
                    yield film


def try_codec(codec: str, films: Sequence[Pixels], quality: int) -> Trial:
    """Encode and decode all films, (H, W) each, with one codec."""
    height, width = films[0].shape
    spec = ImageSpec(height=height, width=width, codec=codec, quality=quality)
    began = time.process_time()
    contents = [encode(film, spec) for film in films]
    encoded = time.process_time()
    back = [decode(content, spec) for content in contents]
    decoded = time.process_time()
    return Trial(
        codec=codec,
        size=sum(map(len, contents)) / len(films),
        encode_s=(encoded - began) / len(films),
        decode_s=(decoded - encoded) / len(films),
        losses=tuple(map(loss, films, back)),
    )


def pick(trials: dict[str, Trial]) -> tuple[str, str]:
    """The codec, and why, in words. `trials` has all of LOSSLESS and `jpeg`."""
    best = min((trials[codec] for codec in LOSSLESS), key=lambda trial: trial.size * LOSSLESS[trial.codec])
    jpeg = trials["jpeg"]
    against = _objection(jpeg, best)
    if against:
        return best.codec, f"{against}; of those without loss it is the smallest that is worth its decoding"
    return "jpeg", (
        f"it moves the pixels that a model sees by {jpeg.difference:.2f} grey levels on average (allowed "
        f"{MEAN_DIFFERENCE:g}), and takes {jpeg.size / best.size:.0%} of what {best.codec} would, the best without loss"
    )


def _objection(jpeg: Trial, best: Trial) -> str | None:
    """What speaks against JPEG; None for nothing."""
    if jpeg.size > JPEG_SHARE * best.size:
        return f"jpeg would take {jpeg.size / best.size:.0%} of its bytes (allowed {JPEG_SHARE:.0%})"
    if jpeg.difference > MEAN_DIFFERENCE:
        return (
            f"jpeg would move the pixels that a model sees by {jpeg.difference:.2f} grey levels on average "
            f"(allowed {MEAN_DIFFERENCE:g})"
        )
    if jpeg.worst > FILM_DIFFERENCE:
        return (
            f"jpeg would move the pixels that a model sees by {jpeg.worst:.2f} grey levels on one film "
            f"(allowed {FILM_DIFFERENCE:g})"
        )
    return None


def _table(trials: dict[str, Trial], films: int) -> list[str]:
    """The trials as lines of text."""
    lines = [
        f"tried on {films} films, one core:",
        f"{'encoding':<8} {'bytes a film':>12} {'encode':>9} {'decode':>9} {'PSNR':>8}  after the resize to 224 x 224",
    ]
    for trial in trials.values():
        quality = f"{trial.psnr:5.1f} dB" if trial.psnr < math.inf else "lossless"
        moved = f"{trial.difference:.2f} grey levels, worst film {trial.worst:.2f}" if trial.worst else "the same"
        times = f"{trial.encode_s * 1e3:6.2f} ms {trial.decode_s * 1e3:6.2f} ms"
        lines.append(f"{trial.codec:<8} {trial.size:12,.0f} {times} {quality:>8}  {moved}")
    return lines
