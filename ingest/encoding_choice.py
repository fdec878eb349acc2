"""`--encoding auto`: try every codec on a few films, pick one by a rule, and say why.

The rule looks at bytes and pixels only, never at the clock, and the films tried are fixed: the same input gives the
same shards on every machine.

1. The lossless codec: the fewest bytes, which count for more where decoding them costs more in every epoch (one EPYC
   core, a 320 px film: raw nothing, png and webp 1.1 ms, jpeg2k 6 ms) or encoding them once (png 2, webp 13 ms).
2. JPEG, if what it loses does not matter and it saves a quarter or more. A film was rounded to whole grey levels when
   it was made and is again when it is resized; one rounding moves a pixel by half a level at most. So JPEG may move the
   resized pixels by half a level on average, and those of no film by more than one. Quality 95 does so by 0.4 on films.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ingest.config import IngestConfig
from ingest.encode import blank
from ingest.films import Film, FolderFilms, H5Films
from ingest.images import Fault
from ingest.inputs import Inputs
from shards.encodings import Loss, Pixels, decode, encode, loss, psnr
from shards.errors import InputError
from shards.schema import ImageSpec

FILMS = 48
"""Films tried, spread evenly over the rows of all sources that have a report."""
LOSSLESS = {"raw": 1.0, "png": 1.1, "webp": 1.15, "jpeg2k": 1.5}
"""Codec -> what a byte of it counts."""
JPEG_SHARE = 0.75
"""The share of the lossless pick's bytes that JPEG may take at most."""
MEAN_DIFFERENCE, FILM_DIFFERENCE = 0.5, 1.0
"""Grey levels by which JPEG may move the resized pixels: on average over all films, and over any one of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What one codec made of the films tried."""

    codec: str
    size: float
    """Bytes a film."""
    encode_s: float
    decode_s: float
    """Seconds a film, on this machine now: told, never looked at."""
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
        for film in _read(inputs, number, here.tolist()):
            if not isinstance(film, Fault) and blank(film) is Fault.NONE:
                yield film


def _read(inputs: Inputs, number: int, rows: Sequence[int]) -> Iterator[Film]:
    """Some rows of one source."""
    source, names = inputs.sources[number], inputs.tables[number].names
    if source.images is not None:
        for row in rows:
            yield from FolderFilms(source.images, source.image_size, names[row : row + 1], row).read(row, row + 1)
    elif rows:
        with H5Films(source) as films:
            for row in rows:
                yield from films.read(row, row + 1)


def try_codec(codec: str, films: Sequence[Pixels], quality: int) -> Trial:
    """Encode and decode all films, (H, W) each, with one codec."""
    height, width = films[0].shape
    spec = ImageSpec(height=height, width=width, codec=codec, quality=quality)
    began = time.perf_counter()
    contents = [encode(film, spec) for film in films]
    encoded = time.perf_counter()
    back = [decode(content, spec) for content in contents]
    decoded = time.perf_counter()
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
