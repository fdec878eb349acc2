"""`python -m shards stats DIR`: a data set in numbers, as a page of text and as JSON; the films that splits share."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from shards.atomic import check_writable, write_atomic, write_json
from shards.cli import check_outside, check_own, say
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.progress import progress
from shards.scan import read_samples, scan
from shards.schema import LABEL_PREFIX, SPLITS, Manifest
from shards.tally import BATCH, LABEL_VALUES, TALLY_COLUMNS, SplitStats, Tally

_ROWS_AT_ONCE = 64
"""Rows read at once, in whole blocks: small blocks are slow one by one, and any of them may hold 128 MiB of text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatsConfig:
    """Say in numbers what a data set holds."""

    root: Positional[Path]
    """Folder of shards."""
    json: Path | None = None
    """Write the same as JSON to this file."""
    shared: Path | None = None
    """Write the keys of films that train shares with val or test, or val with test, for --data.exclude."""

    def __post_init__(self) -> None:
        for flag, path in self.files.items():
            if not path.parent.is_dir():
                raise InputError(f"no folder {path.parent} for {flag}; make it first")
        if self.json is not None and self.shared is not None and self.json.resolve() == self.shared.resolve():
            raise InputError(f"--json and --shared both name {self.json}; give each a file of its own")

    @property
    def files(self) -> dict[str, Path]:
        """Flag -> file to write."""
        return {flag: path for flag, path in (("--json", self.json), ("--shared", self.shared)) if path is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """A data set in numbers."""

    digest: str
    """Of the manifest."""
    context: int
    """Tokens a report is cut to."""
    batch: int
    """Batch for which repeated reports are counted."""
    splits: dict[str, SplitStats]
    shared_films: dict[str, int]
    """`one, other` -> different films that two splits have both, byte for byte."""


def run(config: StatsConfig) -> None:
    """Print the page, and write the JSON if asked."""
    manifest = read_manifest(config.root)
    for flag, path in config.files.items():
        check_outside(path, config.root, flag)
        check_writable(path)
    if config.json is not None:
        check_own(config.json, {"splits", "shared_films"}, "--json")
    tallies = new_tallies(manifest, {split: manifest.rows(split) for split in manifest.splits})
    with progress("stats", manifest.samples, "film") as advance:
        for rows in add_tables(config.root, manifest, tallies):
            advance(rows)
    stats = make_stats(manifest, tallies)
    for line in page(stats):
        say(line)
    if config.json is not None:
        write_json(config.json, asdict(stats))
    if config.shared is not None:
        keys = list(_shared_keys(config.root, manifest, tallies))
        write_atomic(config.shared, "".join(f"{key}\n" for key in keys).encode())
        say(f"{config.shared}: {len(keys):,} keys")


def new_tallies(manifest: Manifest, rows: dict[str, int]) -> dict[str, Tally]:
    """A tally for each split, of so many rows, for `add_tables`."""
    return {split: Tally(manifest, count) for split, count in rows.items()}


def add_tables(root: Path, manifest: Manifest, tallies: dict[str, Tally]) -> Iterator[int]:
    """Read the tables of the manifest's shards once, block by block, and count; gives the rows of each block.

    The manifest may be of a part of the set; images are not read.
    """
    columns = [*TALLY_COLUMNS, *(LABEL_PREFIX + name for name in manifest.labels)]
    for block in scan(root, manifest, columns, rows=_ROWS_AT_ONCE):
        tallies[block.split].add(block.table)
        yield block.table.num_rows


def make_stats(manifest: Manifest, tallies: dict[str, Tally]) -> Stats:
    """The numbers, once every table was added."""
    shared = {
        f"{one}, {other}": len(np.intersect1d(tallies[one].films, tallies[other].films))
        for one, other in itertools.combinations(tallies, 2)
    }
    return Stats(
        digest=manifest.digest,
        context=manifest.tokenizer.context,
        batch=BATCH,
        splits={split: tally.stats() for split, tally in tallies.items()},
        shared_films=shared,
    )


def _shared_keys(root: Path, manifest: Manifest, tallies: dict[str, Tally]) -> Iterator[str]:
    """Keys of the films of each split that a later one has too: the earlier one can do without them."""
    splits = [split for split in SPLITS if split in tallies]
    for number, split in enumerate(splits[:-1]):
        later = np.concatenate([tallies[other].films for other in splits[number + 1 :]])
        rows = np.flatnonzero(np.isin(tallies[split].films, later))
        yield from (row["key"] for _, row in read_samples(root, manifest, split, rows, ("key",)))


_ROWS: tuple[tuple[str, Callable[[SplitStats], str]], ...] = (
    ("samples", lambda s: f"{s.samples:,}"),
    ("images, MB", lambda s: f"{s.image_bytes / 1e6:,.1f}"),
    ("  bytes each: mean", lambda s: f"{s.image_bytes_mean:,.0f}"),
    ("  least", lambda s: f"{s.image_bytes_least:,}"),
    ("  most", lambda s: f"{s.image_bytes_most:,}"),
    ("  same bytes as another film", lambda s: _share(s.duplicate_films, s.samples)),
    ("tokens of a report: mean", lambda s: f"{s.tokens_mean:.1f}"),
    ("  median", lambda s: f"{s.tokens_quantiles['50 %']}"),
    ("  90 %", lambda s: f"{s.tokens_quantiles['90 %']}"),
    ("  99 %", lambda s: f"{s.tokens_quantiles['99 %']}"),
    ("  most", lambda s: f"{s.tokens_quantiles['most']}"),
    ("  cut at the context", lambda s: _share(s.truncated, s.samples)),
    ("reports that name a side", lambda s: _share(s.side_words, s.samples)),
    ("reports that another film has too", lambda s: _share(s.reports.repeating, s.samples)),
    ("  films with the commonest of them", lambda s: f"{s.reports.commonest:,}"),
    ("  by tokens, after the cut", lambda s: _share(s.tokens.repeating, s.samples)),
    (f"  pairs of them in a batch of {BATCH}", lambda s: f"{s.tokens.pairs_in_batch:.2f}"),
    ("  films of the batch in such a pair", lambda s: f"{s.tokens.twins_in_batch:.2f}"),
    ("patients", lambda s: f"{s.groups:,}"),
    ("  films each: mean", lambda s: f"{s.films_per_group_mean:.2f}"),
    ("  most", lambda s: f"{s.films_per_group_most:,}"),
    ("  films of unnamed patients", lambda s: f"{s.ungrouped:,}"),
)

_NAME, _CELL = 36, 9
"""Characters of a line's name, and of a number in the table of labels."""


def page(stats: Stats) -> Iterator[str]:
    """The page, line by line."""
    yield _line("", list(stats.splits))
    for name, show in _ROWS:
        yield _line(name, [show(split) for split in stats.splits.values()])
    yield from leak_lines(stats)
    yield from _label_page(stats.splits)


def leak_lines(stats: Stats) -> Iterator[str]:
    """What lets a model know its test: films that two splits share, patients that may."""
    for pair, count in stats.shared_films.items():
        if count:
            yield f"{count:,} films are in {' and in '.join(pair.split(', '))}, byte for byte: a leak"
    if any(stats.shared_films.values()):
        yield "  python -m shards stats DIR --shared FILE lists them, and --data.exclude FILE trains without them"
    yield from ungrouped_lines({split: numbers.ungrouped for split, numbers in stats.splits.items()})


def ungrouped_lines(ungrouped: dict[str, int]) -> Iterator[str]:
    """What the user has to know who has not said whose the films are: split -> films of unnamed patients."""
    if len(ungrouped) > 1 and any(ungrouped.values()):
        yield f"patients are not named: films of one may be in {' and '.join(ungrouped)}; see --group-column"


def _label_page(splits: dict[str, SplitStats]) -> Iterator[str]:
    """A line a label; of the values those that appear."""
    labels = list(next(iter(splits.values())).labels)
    values = [v for v in LABEL_VALUES if any(split.labels[name][v] for split in splits.values() for name in labels)]
    if labels:
        width = _CELL * len(values)
        yield ""
        yield f"{'labels':<{_NAME}}" + "".join(f"{split:>{width}}" for split in splits)
        yield _line("", values * len(splits), _CELL)
        for name in labels:
            counts = [split.labels[name][value] for split in splits.values() for value in values]
            yield _line(name, [f"{count:,}" for count in counts], _CELL)


def _line(name: str, cells: list[str], width: int = 18) -> str:
    return f"{name:<{_NAME}}" + "".join(f"{cell:>{width}}" for cell in cells)


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.1f} %)"
