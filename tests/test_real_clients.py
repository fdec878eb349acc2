"""open_clip's own trainer on our shards: its command, in a process of its own, without network."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shards.manifest import read_manifest
from shards.schema import SPLITS

NEWEST = (0, 2, 86)
"""The newest webdataset that the trainer takes, says open_clip 3.3's extra `training`. Later ones mark the end of a tar
with an empty sample, and the trainer stops at the first with `KeyError: 'fname'` (webdataset issue 384)."""


def trainer_is_missing() -> str:
    """Why the trainer cannot run here; empty where it can."""
    if importlib.util.find_spec("open_clip_train") is None:
        return "open_clip has no trainer here"
    try:
        found = importlib.metadata.version("webdataset")
    except importlib.metadata.PackageNotFoundError:
        return "webdataset is missing"
    newer = tuple(int(part) for part in re.findall(r"\d+", found)[:3]) > NEWEST
    return f"open_clip's trainer cannot read with webdataset {found}; it takes 0.2.86" if newer else ""


@pytest.mark.slow
@pytest.mark.skipif(bool(trainer_is_missing()), reason=trainer_is_missing())
def test_open_clip_trains_on_our_shards(shards_dir: Path, tmp_path: Path) -> None:
    manifest = read_manifest(shards_dir)
    train, val = (f"{shards_dir}/{split}-{{000000..{len(manifest.splits[split]) - 1:06d}}}.tar" for split in SPLITS[:2])
    command = [
        *("--dataset-type", "webdataset", "--train-data", train, "--train-num-samples", "16", "--val-data", val),
        *("--model", "ViT-S-32-alt"),
        *("--batch-size", "4", "--epochs", "1", "--workers", "1", "--device", "cpu", "--precision", "fp32"),
        *("--log-every-n-steps", "1", "--logs", tmp_path, "--name", "run"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "open_clip_train.main", *map(str, command)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = (tmp_path / "run" / "out.log").read_text()
    assert "Handling webdataset error" not in log
    losses = [float(loss) for loss in re.findall(r"Train Epoch: 0 \[.*? Loss: ([\d.]+)", log)]
    # 4 steps of 4; untrained, each is near ln 4.
    assert len(losses) == 4 and all(1.0 < loss < 2.0 for loss in losses)
    # Its validation reads to the end: every sample, and none twice.
    assert re.findall(r"epoch: 1.0000\s+num_samples: ([\d.]+)", log) == [f"{manifest.rows('val'):.4f}"]
