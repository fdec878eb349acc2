"""What an ingest needs to know."""

import os
from dataclasses import dataclass
from pathlib import Path

from shards.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestConfig:
    """Turn an HDF5 file of films and row-aligned CSV files of reports into verified WebDataset shards."""

    to_shards: Path
    """Folder for the shards; made if it is missing, and it must be empty or hold this same ingest, interrupted."""
    h5: Path
    """HDF5 file of films, (N, H, W) float32 or uint8 with whole grey levels 0..255."""
    csv: tuple[Path, ...]
    """One or more CSV files, row i describing film i."""
    dataset: str = "cxr"
    """Path of the dataset in the HDF5 file."""
    text_column: str = "impression"
    """Column of the reports."""
    label_columns: tuple[str, ...] = ()
    """Columns of labels: numbers (1, 0, -1) or blank, kept as they are."""
    group_column: str | None = None
    """Column of patients: nobody's films are in two splits."""
    val_fraction: float = 0.0
    """Share of the rows for validation, in whole groups."""
    test_fraction: float = 0.0
    """Share of the rows for testing, in whole groups."""
    missing_text: str = "NO IMPRESSION"
    """A report that says only this counts as missing."""
    seed: int = 0
    """Seed of the split and of the global shuffle."""
    workers: int | None = None
    """Encoding processes; None for one a CPU of this job's affinity mask."""
    quality: int = 95
    """JPEG quality."""
    shard_mb: float = 256.0
    """Aim for tars of this many megabytes (10^6 bytes)."""

    def __post_init__(self) -> None:
        if not self.csv:
            raise InputError("--csv names no file; give one or more")
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} is not in [0, 1)")
        if self.val_fraction + self.test_fraction >= 1:
            raise InputError(
                f"--val-fraction {self.val_fraction} and --test-fraction {self.test_fraction} leave no training set"
            )
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers {self.workers} is not a positive number")
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality {self.quality} is not in 1..100")
        if not self.shard_mb > 0:
            raise InputError(f"--shard-mb {self.shard_mb} is not positive")
        if len(set(self.label_columns)) != len(self.label_columns):
            raise InputError(f"--label-columns {' '.join(self.label_columns)} names a column twice")

    @property
    def worker_count(self) -> int:
        """Encoding processes to start."""
        return self.workers or len(os.sched_getaffinity(0))
