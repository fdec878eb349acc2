"""The ingest bench: its made-up inputs are what they claim, its watching sees what is there, its figures add up."""

import csv
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import run_module

from bench.ingest import IngestBenchConfig, _settings
from bench.processes import footprint, run_watched, tree
from bench.sizes import CHUNK_ROWS, SIDE, store_repeated, write_films, write_reports
from bench.storage import MOST_RESIDENT, SlowSettings, evict, resident_bytes
from ingest.source import H5Source
from shards.errors import InputError


def test_made_up_films(tmp_path: Path) -> None:
    """Any number of rows, readable as any other file, far smaller than declared, no film blank, no two alike."""
    films = 20 * CHUNK_ROWS + 5
    path = write_films(tmp_path / "a.h5", films)
    assert path.stat().st_size < films * SIDE * SIDE * 4 / 20
    with H5Source(path) as source:
        assert (source.rows, source.height, source.width, source.chunk_rows) == (films, SIDE, SIDE, CHUNK_ROWS)
        found = source.read_uint8(0, films)
    assert len({film.tobytes() for film in found}) == films
    assert all(len(np.unique(film)) > 50 for film in found[::50])


def test_made_up_reports(tmp_path: Path) -> None:
    with open(write_reports(tmp_path / "a.csv", 1000), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = {row["impression"] for row in rows}
    assert len(texts) == 1000 and 150 < sum(map(len, texts)) / 1000 < 300
    assert len({row["patient"] for row in rows}) == 334


def test_footprint_counts_the_whole_tree() -> None:
    """Memory of the process itself, of its children and of theirs."""
    code = "import subprocess, sys; held = b'x' * (30 << 20); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    inner = "import sys; held = b'x' * (50 << 20); print(flush=True); sys.stdin.read()"
    before = footprint(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", code, inner], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin and child.stdout
    with child.stdin, child.stdout:
        child.stdout.readline()
        assert len(list(tree(child.pid))) == 2
        with mmap.mmap(-1, 256 << 20) as held:  # pages that this process surely did not have before
            for _ in range(256):
                held.write(b"x" * (1 << 20))
            found = footprint(os.getpid())
    child.wait()
    assert found.total == found.parent + sum(found.children)
    assert found.parent - before.parent > 128 << 20  # another process that loads our libraries takes its share of them
    assert found.children[0] > 50 << 20 and found.children[1] > 30 << 20


def test_run_watched(tmp_path: Path) -> None:
    run = run_watched(["tabnanny", "-q", "shards"], [lambda: True, lambda: False], memory=True)
    assert run.marks[0] <= run.marks[1] == run.seconds and 0 < run.cpu_s
    assert run.peak.total >= run.peak.parent > 1 << 20
    with pytest.raises(InputError, match=r"exit code 2: .*no-such-folder"):
        run_watched(["shards", "verify", tmp_path / "no-such-folder"], memory=False)


def test_films_stored_many_times_over(tmp_path: Path) -> None:
    """One file, stored as the first, the films in the order of the repeated CSV; and it can be put out of memory."""
    films = np.arange(10 * 4 * 4, dtype=np.float32).reshape(10, 4, 4)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("cxr", data=films, chunks=(4, 4, 4), compression="gzip", compression_opts=1)
    with h5py.File(store_repeated(tmp_path / "a.h5", "cxr", 3, tmp_path / "b.h5")) as file:
        made = file["cxr"]
        assert (made.chunks, made.compression, made.compression_opts) == ((4, 4, 4), "gzip", 1)
        assert np.array_equal(made[:], np.concatenate([films] * 3))
    assert resident_bytes(tmp_path / "b.h5") > 0
    assert evict([tmp_path / "b.h5"]) <= MOST_RESIDENT


def test_the_bench(source: tuple[Path, Path], tmp_path: Path) -> None:
    h5, table = source
    (tmp_path / "work").mkdir()
    command = ["bench.ingest", "--h5", h5, "--csv", table, "--rounds", "1", "--repeat", "2", "--workers", "1"]
    command.append("--cold")
    command += ["--memory-gb", "0.02", "0.05", "--out", tmp_path / "work", "--json", tmp_path / "r.json"]
    done = run_module(*command, timeout=600)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "work").iterdir()) == []
    result = json.loads((tmp_path / "r.json").read_bytes())
    (case,) = result["cases"]
    assert (case["films"], case["workers"], case["layout"]) == (192, 1, "float32 contiguous")
    assert case["layout"] in done.stdout and "parent bytes a film" in done.stdout
    (taken,) = case["rounds"]
    assert sum(case["phases_s"].values()) == pytest.approx(taken["ingest"]["seconds"])
    assert case["phases_s"]["start"] > 0 and case["phases_s"]["encode"] > 0
    assert case["of_floor"] == pytest.approx(taken["floor"]["seconds"] / taken["ingest"]["seconds"])
    assert taken["floor"]["cpu_s"] < taken["ingest"]["cpu_s"]
    assert [run["films"] for run in result["memory"]["runs"]] == [49, 122]
    for run in result["memory"]["runs"]:
        assert run["peak"] == run["parent"] + sum(run["children"]) > 50 << 20


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"rounds": 0}, "--rounds 0"),
        ({"workers": ()}, "--workers"),
        ({"memory_gb": (-1.0,)}, "--memory-gb"),
        ({"h5": (Path("a.h5"),)}, "both --h5 and --csv"),
        ({"memory_gb": ()}, "or neither"),
    ],
)
def test_mistakes(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        IngestBenchConfig(**settings)


def test_runs_on_other_storage_are_not_compared() -> None:
    usual = _settings(IngestBenchConfig())
    assert list(usual) == ["repeat", "rounds", "cold", "latency_ms", "bandwidth_mb"]
    slow = SlowSettings(latency_ms=2, jitter=1, readahead_kb=64)
    given = {"latency_ms": 2, "jitter": 1, "readahead_kb": 64}
    assert _settings(IngestBenchConfig(slow=slow)) == usual | given
