"""bench.nih: intervals over patients, rows as the split has them, and its refusal to overwrite."""

from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_DATA, assert_refused, run_module

import bench.nih
from bench.nih import NihConfig, clustered_intervals, nih_commands, read_test_rows, table
from shards.manifest import read_manifest


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.nih, "ROUNDS", 100)


def intervals(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> list:
    return clustered_intervals(scores[:, None], labels[:, None], groups, seed=0)


def test_intervals_are_over_patients_not_films() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=60).astype(np.float32)
    scores = (labels + rng.normal(0, 1.5, 60)).astype(np.float32)
    low, high = intervals(scores, labels, np.arange(60))[0]
    # Ten copies of each film of the same patient add nothing; of ten patients they would.
    again = np.tile(scores, 10), np.tile(labels, 10)
    copied, spread = intervals(*again, np.tile(np.arange(60), 10))[0], intervals(*again, np.arange(600))[0]
    assert np.allclose(copied, (low, high))
    assert (spread[1] - spread[0]) < 0.5 * (high - low)


def test_intervals_at_the_edges() -> None:
    labels = np.array([0, 1] * 10, dtype=np.float32)
    assert intervals(labels, labels, np.arange(20))[0] == [1, 1]
    nobody = np.zeros(20, dtype=np.float32)
    assert intervals(labels, nobody, np.arange(20)) == [None, None]
    both = clustered_intervals(np.stack([labels, labels], 1), np.stack([labels, nobody], 1), np.arange(20), seed=0)
    assert both == [[1, 1], None, [1, 1]]  # the mean is over the labels that somebody has


def test_rows_are_those_of_the_split(shards_dir: Path) -> None:
    manifest = read_manifest(shards_dir)
    groups, views = read_test_rows(shards_dir, manifest)
    assert len(groups) == len(views) == manifest.rows("test") and not views.any()
    first, end = manifest.groups["test"]
    assert set(groups) == set(range(first, end))


def test_the_table_takes_a_label_nobody_has() -> None:
    names = ("model", "model_among_abnormal", "thumbnails", "view_ap", "interval")
    record = {"test": {"Hernia": dict.fromkeys(names) | {"films": 0, "patients": 0}}}
    assert table(record)[1].split() == ["Hernia", *"-----", "0", "0"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    assert_refused(run_module("bench.nih", "--data", REAL_DATA / "nih", "--out", tmp_path), "not empty")


def test_the_ingest_it_runs_is_one_that_works(real_data: Path, tmp_path: Path) -> None:
    ingest, *_ = nih_commands(NihConfig(data=real_data / "nih", out=tmp_path))
    done = run_module(*ingest, "--dry-run")
    assert done.returncode == 0 and "1,000" in done.stdout, done.stderr
