"""What an ingest gives back beside the shards: `report.json`, and the same as a page of text, `report.txt`.

Numbers and opaque keys only: no path, no patient, no report. The same input gives the same report.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ingest.images import Fault
from ingest.inputs import Inputs
from shards.atomic import write_atomic, write_json
from shards.encodings import psnr
from shards.schema import REPORT_NAME, REPORT_PAGE_NAME, Manifest, sample_key
from shards.stats import Stats
from shards.stats import page as stats_page

_MOST_LISTED = 1000
"""Sets of equal films that are listed by their keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceReport:
    """What became of one source."""

    kind: str
    """`hdf5` or `images`."""
    rows: int
    samples: int
    rejected: dict[str, int]
    """Reason -> rows; a row may have several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Films:
    """What the films are like."""

    all_zero: int
    constant: int
    """Rows whose film has one grey level only, all zero aside."""
    repeated: int
    """Samples whose film another sample has too, pixel for pixel."""
    repeated_most: int
    """Samples that have the commonest film."""
    equal: tuple[tuple[str, ...], ...]
    """Keys of samples with the same film, a tuple each, at most 1,000 of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """What encoding saved and lost."""

    codec: str
    quality: int | None
    """JPEG quality; None for the lossless codecs."""
    source_bytes: int
    """Of all films of all sources as they were stored."""
    set_bytes: int
    """Of all shards: tars, indices and tables."""
    measured: int
    """Films that were decoded again for the figures below."""
    psnr: float | None
    """dB for a peak of 255; None without loss."""
    resized_psnr: float | None
    """The same after the bicubic resize to 224 x 224."""
    resized_difference: float
    """Mean absolute difference after that resize, grey levels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What came of an ingest."""

    sources: tuple[SourceReport, ...]
    namesakes: int
    """Patient ids that several sources have, and that are taken for different people."""
    unnamed: tuple[int, ...]
    """Sources in several splits that name no patients although others do."""
    films: Films
    encoded: Encoded
    stats: Stats
    """What `python -m shards stats` says: reports, tokens, sides, labels, groups, split by split."""

    @property
    def rows(self) -> int:
        """Rows of all sources."""
        return sum(source.rows for source in self.sources)

    @property
    def samples(self) -> int:
        """Rows that became samples."""
        return sum(source.samples for source in self.sources)

    @property
    def rejected(self) -> Counter[str]:
        """Reason -> rows of all sources."""
        total: Counter[str] = Counter()
        for source in self.sources:
            total.update(source.rejected)
        return total

    @property
    def graded(self) -> list[str]:
        """Labels with numbers beside 1, 0, -1 and blank."""
        counts = [split.labels for split in self.stats.splits.values()]
        return [name for name in counts[0] if any(each[name]["other"] for each in counts)]


def make_report(
    manifest: Manifest, inputs: Inputs, records: NDArray[np.void], rejects: dict[int, str], stats: Stats
) -> Report:
    """Put together what was counted in the tables and what phase one's `records` (rows,) say."""
    return Report(
        sources=tuple(_sources(manifest, inputs, rejects)),
        namesakes=inputs.plan.namesakes,
        unnamed=inputs.plan.unnamed,
        films=_films(inputs, records, rejects),
        encoded=_encoded(manifest, records),
        stats=stats,
    )


def write_report(root: Path, report: Report) -> None:
    """Write both files."""
    write_json(root / REPORT_NAME, asdict(report))
    write_atomic(root / REPORT_PAGE_NAME, ("\n".join(page(report)) + "\n").encode())


def _sources(manifest: Manifest, inputs: Inputs, rejects: dict[int, str]) -> Iterator[SourceReport]:
    starts = inputs.starts
    rejected: list[Counter[str]] = [Counter() for _ in inputs.sources]
    for row, reasons in rejects.items():
        rejected[int(np.searchsorted(starts, row, side="right")) - 1].update(reasons.split("; "))
    for info, counts in zip(manifest.sources, rejected, strict=True):
        yield SourceReport(kind=info.kind, rows=info.rows, samples=info.samples, rejected=dict(counts.most_common()))


def _films(inputs: Inputs, records: NDArray[np.void], rejects: dict[int, str]) -> Films:
    accepted = np.ones(len(records), dtype=bool)
    accepted[list(rejects)] = False
    rows = np.flatnonzero(accepted)
    _, members, counts = np.unique(records["pixels"][rows], return_inverse=True, return_counts=True)
    again = rows[counts[members] > 1]
    sets: dict[int, list[str]] = {}
    for key, member in zip(_keys(inputs, again), members[counts[members] > 1].tolist(), strict=True):
        sets.setdefault(member, []).append(key)
    return Films(
        all_zero=int((records["blank"] == Fault.ALL_ZERO).sum()),
        constant=int((records["blank"] == Fault.CONSTANT).sum()),
        repeated=len(again),
        repeated_most=int(counts.max(initial=0)),
        equal=tuple(tuple(keys) for keys in list(sets.values())[:_MOST_LISTED]),
    )


def _keys(inputs: Inputs, rows: NDArray[np.int64]) -> Iterator[str]:
    """Keys of rows that are numbered through all sources."""
    starts = inputs.starts
    sources = np.searchsorted(starts, rows, side="right") - 1
    return map(sample_key, sources.tolist(), (rows - starts[sources]).tolist())


def _encoded(manifest: Manifest, records: NDArray[np.void]) -> Encoded:
    measured = ~np.isnan(records["error"])
    error, resized, difference = (
        float(records[name][measured].mean()) if measured.any() else 0.0
        for name in ("error", "resized_error", "resized_difference")
    )
    files = [file.bytes for shards in manifest.splits.values() for info in shards
             for file in (info.tar, info.idx, info.parquet)]  # fmt: skip
    return Encoded(
        codec=manifest.image.codec,
        quality=manifest.image.quality if manifest.image.codec == "jpeg" else None,
        source_bytes=int(records["stored"].sum()),
        set_bytes=sum(files),
        measured=int(measured.sum()),
        psnr=psnr(error) if error else None,
        resized_psnr=psnr(resized) if resized else None,
        resized_difference=difference,
    )


def page(report: Report) -> Iterator[str]:
    """The page, line by line."""
    yield f"{report.samples:,} of {report.rows:,} rows became samples"
    for number, source in enumerate(report.sources):
        several = sum(source.rejected.values()) > source.rows - source.samples
        more = "; some of the others have several reasons" if several else ""
        yield f"  source {number} ({source.kind}): {source.samples:,} of {source.rows:,}{more}"
        yield from (f"    rejected {count:,}: {why}" for why, count in source.rejected.items())
    yield from warnings(report.namesakes, report.unnamed, report.graded)
    yield ""
    yield from _film_lines(report.films)
    yield from encoding_lines(report.encoded)
    yield ""
    yield from stats_page(report.stats)


def warnings(namesakes: int, unnamed: Sequence[int], graded: Sequence[str]) -> Iterator[str]:
    """What the user has to know who has the same patients in two sources, or some without; and of graded labels."""
    if namesakes:
        yield (
            f"{namesakes:,} patient ids are in several sources and taken for different people; if they are not, "
            "give these sources one group_namespace"
        )
    if unnamed:
        yield (
            f"source {', '.join(map(str, unnamed))}: patients are not named, so each film counts as one, and films of "
            "one may be in two splits; see group_column"
        )
    if graded:  # ages, wanted or not, and ids
        yield f"labels with numbers that are not 1, 0, -1 or blank: {', '.join(graded)}"
        yield "  they are kept as they are, for whoever gets the shards; leave out a column that tells who a patient is"


def _film_lines(films: Films) -> Iterator[str]:
    yield f"films that show nothing: {films.all_zero:,} all zero, {films.constant:,} of one other grey level"
    listed = f"; {REPORT_NAME} has their keys ({len(films.equal):,} different films)" if films.equal else ""
    yield f"films that another sample has too, pixel for pixel: {films.repeated:,}{listed}"


def encoding_lines(encoded: Encoded) -> Iterator[str]:
    """Bytes saved, and what it cost."""
    factor = encoded.source_bytes / encoded.set_bytes
    yield (
        f"films took {encoded.source_bytes / 1e6:,.1f} MB, the set takes {encoded.set_bytes / 1e6:,.1f} MB: "
        + (f"{factor:.1f} times less" if factor >= 1 else f"{1 / factor:.1f} times more")
    )
    name = encoded.codec if encoded.quality is None else f"{encoded.codec} quality {encoded.quality}"
    if not encoded.measured:
        yield f"{name}: none of the films looked at for its loss became a sample"
    elif encoded.psnr is None:
        yield f"{name}: no loss in {encoded.measured:,} films measured"
    else:
        yield (
            f"{name}: PSNR {encoded.psnr:.1f} dB; after the resize to 224 x 224 {encoded.resized_psnr:.1f} dB, "
            f"{encoded.resized_difference:.2f} grey levels on average, over {encoded.measured:,} films measured"
        )
