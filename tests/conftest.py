"""Fixtures shared by all tests: real data where it lies beside the repository, small made-up sets everywhere."""

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest

if TYPE_CHECKING:
    from soak_train import Server

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_DATA = REPOSITORY.parent / "shared" / "data"
SIZE = 320

# Tests start many processes; one intra-op thread each keeps two cores from thrashing.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a shell starts in the background (`make test &`) ignores Ctrl-C, what nohup starts SIGHUP, and so would the
# processes that tests interrupt.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


# A property that takes 0.2 s on a busy machine, or examples that take seconds to draw, are no less true.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real films and reports; skips where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real films at {REAL_DATA}")
    return REAL_DATA


def run_module(*arguments: str | Path, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m ARGUMENTS` as a user would and return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def state(pid: int) -> str:
    """R, S, Z (dead, not waited for) ...; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """A user's mistake ends with exit code 2 and one plain line that holds `words`."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def made_up_images(count: int, seed: int = 0) -> np.ndarray:
    """(count, 320, 320) uint8: smooth random fields with some noise, so that JPEG behaves as on films."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(40, 215, (count, 11, 11))
    grid = np.linspace(0, 9.999, SIZE)
    low, part = grid.astype(int), grid - grid.astype(int)
    rows = coarse[:, low] * (1 - part)[None, :, None] + coarse[:, low + 1] * part[None, :, None]
    smooth = rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part
    return np.clip(np.round(smooth + rng.normal(0, 4, smooth.shape)), 0, 255).astype(np.uint8)


def write_h5(path: Path, images: np.ndarray, dataset: str = "cxr") -> Path:
    """A contiguous HDF5 dataset, as CheXzero writes it."""
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset(dataset, data=images)
    return path


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    """A CSV file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


FINDINGS = ("Cardiomegaly", "Pleural Effusion")


def write_source(folder: Path, count: int = 96, seed: int = 0) -> tuple[Path, Path]:
    """An HDF5 file and a CSV of `count` made-up films of count // 3 patients; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    images = made_up_images(count, seed).astype(np.float32)
    sides = ("left", "right", "no")
    rows = [
        [f"p{i // 3}/film{i}.png", f"Film {i}: {sides[i % 3]} effusion.", f"MRN{i // 3}", i % 2, ("", 1, 0, -1)[i % 4]]
        for i in range(count)
    ]
    header = ["Path", "impression", "patient", *FINDINGS]
    return write_h5(folder / "cxr.h5", images), write_csv(folder / "reports.csv", header, rows)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """`cxr.h5` and `reports.csv` of 96 made-up films. Read only."""
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def shards_dir(source: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the made-up films: 60 or so for training in 3 shards, val, test. Read only; copy before changing."""
    from ingest.config import IngestConfig
    from ingest.run import ingest

    out = tmp_path_factory.mktemp("shards") / "set"
    h5, table = source
    ingest(
        IngestConfig(
            to_shards=out,
            h5=(h5,),
            csv=(table,),
            label_columns=FINDINGS,
            group_column="patient",
            val_fraction=0.2,
            test_fraction=0.15,
            workers=1,
            shard_mb=0.5,
        )
    )
    return out


@pytest.fixture(scope="module")
def server() -> Iterator["Server"]:
    """Starts runs of train.main."""
    from soak_train import serving

    with serving() as running:
        yield running
