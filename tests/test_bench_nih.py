"""bench.nih: rows as the split has them, and its refusal to overwrite."""

from pathlib import Path

import pytest
from conftest import run_module

from bench.nih import NihConfig, nih_commands, read_test_rows, run_nih
from bench.tables import nih_tables
from shards.errors import InputError
from shards.manifest import read_manifest


def test_rows_are_those_of_the_split(shards_dir: Path) -> None:
    manifest = read_manifest(shards_dir)
    groups, views = read_test_rows(shards_dir, manifest)
    assert len(groups) == len(views) == manifest.rows("test") and not views.any()
    first, end = manifest.groups["test"]
    assert set(groups) == set(range(first, end))


def test_the_table_takes_a_label_nobody_has() -> None:
    names = ("model", "model_among_abnormal", "thumbnails", "view_ap", "interval")
    record = {"test": {"Hernia": dict.fromkeys(names) | {"films": 0, "patients": 0}}}
    (table,) = nih_tables(record)
    assert table.rows == (("Hernia", "0", "0"),)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        run_nih(NihConfig(data=tmp_path, out=tmp_path))


def test_the_ingest_it_runs_is_one_that_works(real_data: Path, tmp_path: Path) -> None:
    ingest, *_ = nih_commands(NihConfig(data=real_data / "nih", out=tmp_path))
    done = run_module(*ingest, "--dry-run")
    assert done.returncode == 0 and "1,000" in done.stdout, done.stderr
