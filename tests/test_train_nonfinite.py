"""FAULTS.md's T9: losses and gradients that are no numbers, on one rank and on one of two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from injected.nonfinite import injected

from shards.manifest import read_manifest
from shards.reader import ShardReader
from shards.schema import sample_key
from train import nonfinite
from train.checkpoint import list_checkpoints, read_checkpoint
from train.main import main
from train.objective import Contrastive

SMALL = (
    *("--steps", "12", "--batch-size", "8", "--model.widths", *("16",) * 4, "--device", "cpu", "--threads", "1"),
    *("--data.image-size", "64", "--log-every", "1", "--validate-every", "0", "--save-every", "4"),
    *("--optim.warmup", "0", "--optim.lr", "1e-4"),
)


def rows(out: Path) -> dict[int, dict]:
    """The rows of a run's metrics by step."""
    return {row["step"]: row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())}


def reported(out: Path) -> list[dict]:
    """The steps that the run says had no number."""
    return [json.loads(line) for line in (out / "nonfinite.jsonl").read_text().splitlines()]


def train(shards: Path, out: Path, *more: str) -> None:
    """A run in this process."""
    main(["--shards", str(shards), "--out", str(out), *SMALL, *more])


def refused(capsys: pytest.CaptureFixture[str], shards: Path, out: Path, *more: str) -> str:
    """The line with which a run ends; exit code 2."""
    with pytest.raises(SystemExit) as stop:
        train(shards, out, *more)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def key_of(shards: Path, shard: int, row: int) -> str:
    """The key of a training sample, from the shard's whole table."""
    manifest = read_manifest(shards)
    with ShardReader(shards, manifest, manifest.splits["train"][shard]) as reader:
        record = reader.read_table().slice(row, 1).to_pylist()[0]
    return sample_key(record["source"], record["row"])


def assert_finite(payload: dict) -> None:
    """Weights and the optimizer's memory of gradients are numbers."""
    moments = [each for state in payload["optimizer"]["state"].values() for each in state.values()]
    assert all(each.isfinite().all() for each in (*payload["model"].values(), *moments))


@pytest.fixture(scope="module")
def clean(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps without a fault. Read only."""
    out = tmp_path_factory.mktemp("nonfinite") / "clean"
    train(shards_dir, out)
    return out


@pytest.mark.parametrize("kind", ["nan", "loss", "gradient"])
def test_a_run_stops_and_names_what_it_was_on(
    kind: str, shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Looked at two steps later, on a log step; the checkpoint before is left, and none is added."""
    spoilt: list[tuple[int, int]] = []
    with injected(f"{kind}:0:6", 8, spoilt):
        line = refused(capsys, shards_dir, tmp_path, "--log-every", "4")
    (told,) = reported(tmp_path)
    assert told["step"] == 6 and "step 6" in line and told["keys"][0] in line and "--on-nonfinite skip" in line
    if kind == "nan":
        assert told["keys"] == [key_of(shards_dir, *spoilt[0])] and not told["whole_batch"]
    else:
        assert len(set(told["keys"])) == 8 and told["whole_batch"] and "and 4 more" in line
    assert (told["loss"] == {"nan": "nan", "loss": "inf"}.get(kind)) == (kind != "gradient")
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [4]
    assert_finite(read_checkpoint(tmp_path / "checkpoints/step-0000004.pt"))


@pytest.mark.parametrize("kind", ["nan", "loss", "gradient"])
def test_skipping_leaves_the_update_out_and_goes_on(kind: str, clean: Path, shards_dir: Path, tmp_path: Path) -> None:
    with injected(f"{kind}:0:6", 8):
        train(shards_dir, tmp_path, "--on-nonfinite", "skip", "--stop-at", "8")
        if kind == "nan":
            train(shards_dir, tmp_path, "--on-nonfinite", "skip", "--resume", "auto")
    found, expected = rows(tmp_path), rows(clean)
    assert [found[step]["skipped_steps"] for step in (5, 6, 8)] == [0, 1, 1]
    assert (found[6]["loss"] is None) == (kind != "gradient"), "a loss of an earlier step"
    assert found[8]["order_digest"] == expected[8]["order_digest"]
    assert [found[step]["loss"] for step in range(1, 6)] == [expected[step]["loss"] for step in range(1, 6)]
    assert found[7]["loss"] != expected[7]["loss"]  # the clean run has learnt from step 6
    last = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[0][1])
    assert last["skipped"] == 1 and last["position"] == 8 * last["step"]
    assert_finite(last)
    assert kind != "nan" or last["step"] == 12


def test_skipping_without_end_is_an_end(
    shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nonfinite, "GIVE_UP", 5)
    with injected("nan:0:" + ":".join(map(str, range(3, 13))), 8):
        line = refused(capsys, shards_dir, tmp_path, "--on-nonfinite", "skip")
    assert "last 5 steps" in line and max(rows(tmp_path)) == 6 and len(reported(tmp_path)) == 5


def test_overflowed_weights_are_not_saved(
    shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An update that overflows where loss and gradient have not: seen before the save of the same step."""
    updates = []

    def overflow(_: Contrastive, model: torch.nn.Module) -> None:
        updates.append(1)
        if len(updates) == 8:
            with torch.no_grad():
                model.text.ln_final.weight[3] = float("inf")

    monkeypatch.setattr(Contrastive, "constrain", overflow)
    line = refused(capsys, shards_dir, tmp_path)
    assert "a weight is no number after step 8" in line
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [4]


def on_two_ranks(shards: Path, out: Path, *more: str) -> tuple[int, str]:
    """A run on two processes of which the second meets NaN in steps 6 and 7; exit code and stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(REPOSITORY / "tests/injected/nonfinite.py"), "--shards", str(shards), "--out", str(out), *SMALL]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "SHARDCLIP_NONFINITE": "nan:1:6:7"}
    done = subprocess.run(
        [*command, *more],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stderr


@pytest.mark.slow
def test_two_ranks_stop_together_for_a_nan_of_one(shards_dir: Path, tmp_path: Path) -> None:
    code, errors = on_two_ranks(shards_dir, tmp_path)
    said = [line for line in errors.splitlines() if line.startswith("train.main: ")]
    assert code != 0 and len(said) == 1 and "step 6" in said[0], errors
    (told,) = reported(tmp_path)
    assert len(told["keys"]) == 1 and told["keys"][0] in said[0]
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [4]
    assert_finite(read_checkpoint(tmp_path / "checkpoints/step-0000004.pt"))


@pytest.mark.slow
def test_two_ranks_skip_the_same_updates(clean: Path, shards_dir: Path, tmp_path: Path) -> None:
    code, errors = on_two_ranks(shards_dir, tmp_path, "--on-nonfinite", "skip")
    assert code == 0, errors
    assert [row["skipped_steps"] for row in rows(tmp_path).values()] == [0] * 5 + [1] + [2] * 6
    assert rows(tmp_path)[12]["order_digest"] == rows(clean)[12]["order_digest"]
    assert_finite(read_checkpoint(tmp_path / "checkpoints/step-0000012.pt"))
