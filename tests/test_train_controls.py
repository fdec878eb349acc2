"""train.controls: thumbnails read from shards, verdicts, and the whole command at its smallest."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import FINDINGS, assert_refused, run_module

from shards.manifest import read_manifest
from train.commandline import preset
from train.controls import judge, read_thumbnails, table, thumbnails, with_mean


def scores(**means: float) -> dict:
    return {name: {"Edema": mean, "mean": mean} for name, mean in means.items()}


@pytest.mark.parametrize(
    ("changed", "failed"),
    [
        ({}, set()),
        ({"untrained": 0.58}, {"untrained"}),
        ({"shuffled": 0.42}, {"shuffled"}),
        ({"thumbnails": 0.86}, {"thumbnails"}),
        ({"model": float("nan")}, {"thumbnails"}),
    ],
)
def test_each_control_can_fail(changed, failed):
    means = {"untrained": 0.52, "shuffled": 0.45, "thumbnails": 0.7, "model": 0.9, **changed}
    assert {name for name, passed in judge(scores(**means)).items() if not passed} == failed


def test_mean_leaves_out_labels_without_a_score():
    assert with_mean({"a": 0.5, "b": None, "c": 0.75})["mean"] == 0.625
    assert with_mean({"a": None})["mean"] is None


def test_table_has_a_line_a_label_and_the_verdicts():
    values = scores(untrained=0.5, shuffled=0.6, thumbnails=0.7, model=0.9)
    lines = table({"split": "test", "auroc": values, "passed": judge(values)})
    assert lines[1].split() == ["Edema", "0.500", "0.600", "0.700", "0.900"]
    assert lines[-1].split() == ["ok", "FAILED", "ok"]


def test_thumbnails_are_the_shards_own_rows(shards_dir):
    manifest = read_manifest(shards_dir)
    settings = replace(preset("tiny"), shards=shards_dir, out=Path("."))
    pixels, labels = read_thumbnails(settings, "test")
    assert pixels.shape == (manifest.rows("test"), 256) and labels.shape == (len(pixels), len(FINDINGS))
    assert pixels.std() > 0.1 and np.isnan(labels).any()
    found = thumbnails(settings, manifest, "test")
    assert set(found) == {*FINDINGS, "mean"} and all(0 <= found[name] <= 1 for name in FINDINGS)


def test_data_without_labels_or_splits_is_refused(tmp_path):
    assert_refused(run_module("train.controls", "--shards", tmp_path, "--out", tmp_path / "c"), "manifest.json")


@pytest.mark.slow
def test_the_whole_command(shards_dir, tmp_path):
    arguments = ["--shards", shards_dir, "--out", tmp_path, "--steps", "2", "--ranks", "1"]
    done = run_module("train.controls", *arguments, timeout=600)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    record = json.loads((tmp_path / "controls.json").read_text())
    assert set(record["auroc"]) == {"untrained", "shuffled", "thumbnails", "model"}
    assert all(0 <= record["auroc"]["shuffled"][name] <= 1 for name in (*FINDINGS, "mean"))
    assert done.returncode == (0 if all(record["passed"].values()) else 1)
    config = json.loads((tmp_path / "shuffled" / "config.json").read_text())
    assert config["shuffle_reports"] is True
    assert all(label in done.stdout for label in FINDINGS)
