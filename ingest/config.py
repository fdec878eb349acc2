"""What an ingest needs to know: one source on the command line, or several in a TOML file."""

import dataclasses
import math
import os
import re
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shards.errors import InputError
from shards.schema import SPLITS


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One source: films in HDF5 or in a folder, and CSV files whose row i describes film i."""

    h5: tuple[Path, ...] = ()
    """HDF5 files of films, (N, H, W), one after the other."""
    dataset: str = "cxr"
    """Path of the dataset in the HDF5 files."""
    value_range: tuple[float, float] | None = None
    """Values that become black and white, clipped outside; without it pixels are whole grey levels 0..255, and image
    files of 16 bits use their upper half. Films of 8 bits are kept as they are where it goes beyond 0..255, as `0 4095`
    for 12 bits does, and DICOM always."""
    images: Path | None = None
    """Folder of image files, instead of HDF5."""
    path_column: str = "Path"
    """Column that names each row's image file, relative to that folder."""
    image_size: int = 320
    """Image files are fitted into a square of this side, long side first, zero-padded, as CheXzero does."""
    allow_blank: bool = False
    """Keep films of one value throughout, which are rejected otherwise."""
    csv: tuple[Path, ...] = ()
    """CSV files, row i of each about film i."""
    text_column: str = "impression"
    """Column of the reports."""
    text_template: str | None = None
    """Report made from several columns instead: `{Finding Labels}. {View Position} view.`"""
    text_folder: Path | None = None
    """Folder of report files (plain text, or the Indiana collection's XML), which `text_column` names."""
    section: str | None = None
    """Section to cut out of full reports, e.g. `impression`."""
    missing_text: str = "NO IMPRESSION"
    """A report that says only this counts as missing."""
    label_columns: tuple[str, ...] = ()
    """Columns of labels: numbers (1, 0, -1) or blank, kept as they are."""
    allow_label_numbers: bool = False
    """Take labels of five digits, or of hundreds of numbers or findings, as ages in days have; refused as ids else."""
    label_list_column: str | None = None
    """Column of findings joined by `|`: a label column for each, 1 where it is named and 0 elsewhere."""
    label_list_separator: str = "|"
    """What joins the findings of --label-list-column."""
    group_column: str | None = None
    """Column of patients: nobody's films are in two splits."""
    group_regex: str | None = None
    """Takes the patient out of --group-column: first group or whole match; `/p(\\d+)/s` for paths of MIMIC-CXR."""
    group_namespace: str | None = None
    """Sources of a list that give the same name here have the same patients; without it each has its own."""
    split: Literal["train", "val", "test"] | None = None
    """All rows of this source go to this split."""
    split_column: str | None = None
    """Column that names each row's split; blank for a row that the fractions decide."""

    def check(self) -> None:
        """InputError where the settings contradict each other."""
        if bool(self.h5) == bool(self.images):
            raise InputError("a source needs either --h5 or --images, and only one of them")
        if not self.csv:
            raise InputError("--csv names no file; give one or more")
        if self.split and self.split_column:
            raise InputError("--split and --split-column contradict each other; give one")
        self._check_kind()
        self._check_empty()
        if self.group_column is not None and self.group_column in (*self.label_columns, self.label_list_column):
            raise InputError(f"--group-column {self.group_column!r} is a label column too, which would show who it is")
        if self.group_regex is not None:
            self._check_regex()
        if self.group_namespace is not None and self.group_column is None:
            raise InputError("--group-namespace needs --group-column, the column of the patients who share it")
        if self.value_range is not None and not -math.inf < self.value_range[0] < self.value_range[1] < math.inf:
            raise InputError(f"--value-range {self.value_range[0]:g} {self.value_range[1]:g} is not a range")
        if self.image_size < 1:
            raise InputError(f"--image-size {self.image_size} is not positive")
        if len(set(self.label_columns)) != len(self.label_columns):
            raise InputError(f"--label-columns {' '.join(self.label_columns)} names a column twice")

    def _check_empty(self) -> None:
        """A shell puts nothing in the place of a variable that it does not know: nobody means that."""
        for name, value in dataclasses.asdict(self).items():
            spaced = name == "label_list_separator"  # which a space may be
            if isinstance(value, str) and name != "missing_text" and not (value if spaced else value.strip()):
                raise InputError(f"--{name.replace('_', '-')} is empty; give it a value, or leave it out")

    def _check_kind(self) -> None:
        """A setting that says nothing about this kind of films was meant to do something."""
        default = SourceConfig()
        others = ("dataset",) if self.images else ("path_column", "image_size")
        given = next((name for name in others if getattr(self, name) != getattr(default, name)), None)
        if given is not None:
            kinds = ("--images", "--h5") if self.images else ("--h5", "--images")
            raise InputError(
                f"--{given.replace('_', '-')} does nothing with {kinds[0]}, it is for {kinds[1]}; leave it out"
            )

    def _check_regex(self) -> None:
        if self.group_column is None:
            raise InputError("--group-regex needs --group-column, the column it takes the patient from")
        import regex  # the one that ingest.table searches with

        try:
            regex.compile(self.group_regex or "")
        except regex.error as error:
            raise InputError(f"--group-regex {self.group_regex!r} is not a regular expression ({error})") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestConfig(SourceConfig):
    """Turn films and reports into verified WebDataset shards."""

    to_shards: Path
    """Folder for the shards; made if it is missing, and it must be empty or hold this same ingest, interrupted."""
    sources: Path | None = None
    """TOML file with a `[[source]]` table for each of several sources, instead of the flags of one."""
    val_fraction: float = 0.0
    """Share of the rows for validation, in whole patients; of those without a split of their own."""
    test_fraction: float = 0.0
    """The same for testing."""
    seed: int = 0
    """Seed of the split and of the global shuffle."""
    workers: int | None = None
    """Encoding processes; none: one for each CPU that this job may use."""
    scheduler: str | None = None
    """Work on a Dask cluster instead: `tcp://HOST:PORT`, `tls://HOST:PORT`, or the file that the scheduler wrote."""
    scheduler_wait: float = 60.0
    """Seconds to wait for that scheduler, and for a worker whenever it has none."""
    encoding: Literal["auto", "jpeg", "png", "webp", "jpeg2k", "raw"] = "jpeg"
    """How images are stored; all but jpeg are lossless. `auto` tries them on some films and says what it takes."""
    quality: int = 95
    """JPEG quality."""
    shard_mb: float = 256.0
    """Aim for tars of this many megabytes (10^6 bytes)."""
    max_rejects: float = 0.5
    """Refuse where more than this share of the rows is rejected: a sign of a wrong column or a broken file."""
    dry_run: bool = False
    """Say what would happen, and write nothing."""

    def __post_init__(self) -> None:
        self._check_empty()
        for name in ("val_fraction", "test_fraction", "max_rejects"):
            value = getattr(self, name)
            if not (0 <= value < 1 or (name == "max_rejects" and value == 1)):
                raise InputError(f"--{name.replace('_', '-')} {value} is not in [0, 1)")
        if self.val_fraction + self.test_fraction >= 1:
            raise InputError(f"fractions {self.val_fraction} for val and {self.test_fraction} for test leave no train")
        if self.workers is not None and not 1 <= self.workers <= 4096:
            raise InputError(f"--workers {self.workers} is not a positive number up to 4,096")
        if self.workers is not None and self.scheduler is not None:
            raise InputError("--workers starts processes here, --scheduler uses those of a cluster; give one of them")
        if not 0 < self.scheduler_wait < math.inf:
            raise InputError(f"--scheduler-wait {self.scheduler_wait} is not a positive number of seconds")
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality {self.quality} is not in 1..100")
        if not 0.001 <= self.shard_mb <= 1e6:
            raise InputError(f"--shard-mb {self.shard_mb} is not in 0.001..1,000,000")

    @property
    def worker_count(self) -> int:
        """Encoding processes to start."""
        return self.workers or len(os.sched_getaffinity(0))

    def source_list(self) -> tuple[SourceConfig, ...]:
        """The sources, checked: those of the TOML file, or the one of the command line."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(SourceConfig)}
        if self.sources is None:
            found: tuple[SourceConfig, ...] = (SourceConfig(**fields),)
        else:
            defaults = {field.name: field.default for field in dataclasses.fields(SourceConfig)}
            given = [name for name in fields if fields[name] != defaults[name]]
            if given:
                raise InputError(f"--{given[0].replace('_', '-')} belongs into {self.sources}, which lists the sources")
            found = read_sources(self.sources)
        for source in found:
            source.check()
        return found


def read_sources(path: Path) -> tuple[SourceConfig, ...]:
    """The `[[source]]` tables of a TOML file, in which paths are relative to its folder. InputError for a mistake."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML ({error})") from None
    tables = content.get("source")
    if set(content) != {"source"} or not isinstance(tables, list) or not 0 < len(tables) <= 100:
        raise InputError(f"{path} needs one to 100 [[source]] tables and nothing beside them")
    return tuple(_read_source(table, path, number) for number, table in enumerate(tables))


def _read_source(table: dict[str, Any], path: Path, number: int) -> SourceConfig:
    hints = typing.get_type_hints(SourceConfig)
    values = {}
    for name, value in table.items():
        if name not in hints:
            raise InputError(f"source {number} of {path} has no setting {name!r}; valid: {', '.join(hints)}")
        try:
            values[name] = _convert(hints[name], value, path.parent)
        except (TypeError, ValueError):
            wanted = re.sub(r"<class '|'>|typing\.|pathlib\.", "", str(_inner(hints[name])))
            raise InputError(f"source {number} of {path}: {name} = {value!r} should be {wanted}") from None
    return SourceConfig(**values)


def _inner(hint: Any) -> Any:
    """A field's type, None left out: a TOML file leaves the setting out instead."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(option for option in typing.get_args(hint) if option is not types.NoneType)
    return hint


def _convert(hint: Any, value: Any, folder: Path) -> Any:
    """A TOML value as a field's type; ValueError or TypeError where it is another."""
    hint = _inner(hint)
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        values = value if isinstance(value, list) else [value]
        if kinds[-1] is not Ellipsis and len(values) != len(kinds):
            raise ValueError(value)
        return tuple(_convert(kinds[0], item, folder) for item in values)
    if typing.get_origin(hint) is Literal:
        if value not in SPLITS:
            raise ValueError(value)
        return value
    if hint is Path:
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError(value)
        return folder / value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int):
        return float(value)
    if not isinstance(value, hint) or isinstance(value, bool):
        raise TypeError(value)
    return value
