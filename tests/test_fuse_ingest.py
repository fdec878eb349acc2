"""Whole ingests on a file system that does what GPFS, Lustre and NFS may: the same bytes, or a line and another try."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import FINDINGS, REPOSITORY, assert_refused, run_module
from fuse_storage import Mount, mounted

from ingest.phantom import PhantomConfig, make_phantom
from ingest.source import H5Source
from shards.verify import verify

pytestmark = pytest.mark.slow

POOR = {"links": False, "locks": False, "sync_folders": False, "whole_seconds": True, "direct": "transfer"}


def command(root: Path) -> list[str]:
    """The ingest that made `shards_dir`, from and to a mounted folder."""
    split = ("--group-column", "patient", "--val-fraction", "0.2", "--test-fraction", "0.15")
    inputs = ("--h5", str(root / "cxr.h5"), "--csv", str(root / "reports.csv"), "--label-columns", *FINDINGS)
    return ["ingest", "--to-shards", str(root / "out"), *inputs, *split, "--workers", "2", "--shard-mb", "0.5"]


def contents(root: Path) -> dict[str, bytes]:
    """All files but `ingest.json`, which holds the time of the HDF5 file."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "ingest.json")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture
def disk(tmp_path: Path, source: tuple[Path, Path]) -> Path:
    """A folder with the source in it, to be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    for path in source:
        shutil.copy2(path, folder)
    return folder


@pytest.mark.parametrize(
    "faults, fault",
    [
        (POOR, "direct transfer"),
        ({"most_bytes": 40_001, "cache_s": 3, "rules": [["read", ".", "EINTR", 5, 5]]}, "read EINTR"),
    ],
)
def test_the_same_bytes(disk: Path, tmp_path: Path, shards_dir: Path, faults: dict, fault: str) -> None:
    with mounted(disk, tmp_path / "node", **faults) as node:
        done = run_module(*command(node.root))
        assert done.returncode == 0, done.stderr
        assert node.fired()[fault]
        assert [problem for _, problem in verify(node.root / "out") if problem] == []
    assert contents(disk / "out") == contents(shards_dir)


def test_a_phantom_where_there_are_no_locks(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with mounted(tmp_path / "disk", tmp_path / "node", locks=False) as node:
        for _ in range(2):  # drawn, and found to be there
            make_phantom(PhantomConfig(out=node.root, samples=2, workers=1))
    make_phantom(PhantomConfig(out=tmp_path, samples=2, workers=1))
    assert contents(tmp_path / "disk") == {name: (tmp_path / name).read_bytes() for name in ("cxr.h5", "reports.csv")}


@pytest.mark.parametrize(
    "faults, fault",
    [
        ({"direct": "transfer"}, "direct transfer"),
        (
            {"most_bytes": 40_001, "direct": "alignment"},
            "direct transfer",
        ),  # the rest of a short read
        ({"steady_inodes": False}, "direct taken"),
    ],
)
def test_films_past_the_page_cache(disk: Path, tmp_path: Path, faults: dict, fault: str) -> None:
    with h5py.File(disk / "cxr.h5") as file:
        wanted = file["cxr"][:]
    with mounted(disk, tmp_path / "node", **faults) as node, H5Source(node.root / "cxr.h5", "cxr") as films:
        assert films.contiguous
        spans = [(0, 7), (7, 31), (31, 96)]
        for (first, end), found in zip(spans, films.read_direct(spans, 2), strict=True):
            assert np.array_equal(found, wanted[first:end])
        assert node.fired()[fault]


@pytest.mark.parametrize(
    "rule, words",
    [
        (["close", r"train-000001\.tar$", "EDQUOT", 0, 1], ["train-000001.tar", "quota exceeded"]),
        (["rename", r"manifest\.json$", "done EIO", 0, 1], ["manifest.json", "Input/output error"]),
        (["read", r"cxr\.h5$", "ESTALE", 9, -1], ["cxr.h5", "Stale file handle"]),
    ],
)
def test_a_line_and_a_second_try(disk: Path, tmp_path: Path, shards_dir: Path, rule: list, words: list[str]) -> None:
    with mounted(disk, tmp_path / "node", rules=[rule]) as node:
        assert_refused(run_module(*command(node.root)), *words)
        assert node.fired()
        made = contents(disk / "out") if (disk / "out").exists() else {}
        wanted = contents(shards_dir)
        assert {name for name in made if "/" not in name and made[name] != wanted.get(name)} == set()
    again = run_module(*command(disk))
    assert again.returncode == 0, again.stderr
    assert contents(disk / "out") == wanted


def test_the_server_goes_away(disk: Path, tmp_path: Path, shards_dir: Path) -> None:
    with mounted(disk, tmp_path / "node", rules=[["write", "spill$", "hang 0.5", 0, -1]]) as node:
        running = start(node)
        while not node.fired():  # in the midst of the first spills
            assert running.poll() is None
            time.sleep(0.05)
        os.kill(node.daemon, 9)
        stdout, stderr = running.communicate(timeout=600)
        assert_refused(subprocess.CompletedProcess([], running.returncode, stdout, stderr), "not connected")
    again = run_module(*command(disk))
    assert again.returncode == 0, again.stderr
    assert contents(disk / "out") == contents(shards_dir)


def test_two_nodes_at_once(disk: Path, tmp_path: Path, shards_dir: Path) -> None:
    with (
        mounted(disk, tmp_path / "a", links=False, cache_s=2) as first,
        mounted(disk, tmp_path / "b", links=False, cache_s=1) as second,
    ):
        running = [start(first), start(second)]
        ends = [(*each.communicate(timeout=600), each.returncode) for each in running]
        assert sorted(code for *_, code in ends) == [0, 2], ends
        (refused,) = (stderr for _, stderr, code in ends if code)
        assert "another ingest is writing to" in refused or "already holds a finished data set" in refused
    assert contents(disk / "out") == contents(shards_dir)


def start(node: Mount) -> subprocess.Popen:
    """An ingest on a mounted folder."""
    return subprocess.Popen(
        [sys.executable, "-m", *command(node.root)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
