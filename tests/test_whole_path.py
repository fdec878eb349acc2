"""The whole path on real films, by the commands a user types: ingest, verify, 30 steps on 2 ranks, bench."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, assert_refused, run_module

STEPS = 30


def torchrun(*arguments: str | Path, ranks: int = 2, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a module under a real torchrun with gloo ranks on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.slow
def test_chexzero_films(real_data: Path, tmp_path: Path) -> None:
    folder, shards, run = real_data / "chexzero", tmp_path / "shards", tmp_path / "run"
    h5, tables = folder / "cxr.h5", [folder / "cxr_paths.csv", folder / "impressions.csv"]
    done = run_module("ingest", "--to-shards", shards, "--h5", h5, "--csv", *tables, "--val-fraction", "0.2")
    assert done.returncode == 0, done.stderr
    done = run_module("shards", "verify", shards)
    assert done.returncode == 0 and "92 samples" in done.stdout, done.stderr

    train = ["train.main", "--preset", "tiny", "--shards", shards, "--steps", STEPS, "--batch-size", "16"]
    done = torchrun(*train, "--log-every", "10", "--out", run)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[-1]["loss"] < rows[0]["loss"] and "val_loss" in rows[-1]
    assert (run / "curves.png").stat().st_size > 10_000

    result = tmp_path / "bench.json"
    bench = ["bench.loader", "--shards", shards, "--h5", h5, "--csv", *tables, "--json", result]
    done = run_module(
        *bench, "--rounds", "1", "--seconds", "0.5", "--warmup-batches", "1", "--only", "hdf5", "hdf5-tuned", "cpu"
    )
    assert done.returncode == 0, done.stderr
    cases = {case["name"]: case for case in json.loads(result.read_text())["cases"]}
    assert {"hdf5", "hdf5-tuned", "cpu"} <= set(cases)
    assert cases["hdf5"]["ratio_to_hdf5"] == 1 and all(case["images_per_s"] > 0 for case in cases.values())

    # Nothing of a patient, a path or a report in what a run leaves behind or says.
    said = done.stdout + done.stderr
    said += "".join(path.read_text() for path in run.glob("*.json*"))
    for secret in ("p000005", "ARDSSevere", "jkms-35", "intubated"):
        assert secret not in said
        for path in [*run.rglob("*.pt"), *run.rglob("events*")]:
            assert secret.encode() not in path.read_bytes()


def test_bench_refuses_another_source(shards_dir: Path, source: tuple[Path, Path], tmp_path: Path) -> None:
    h5, table = source
    bench = ["bench.loader", "--shards", shards_dir, "--h5", h5]
    other = tmp_path / "other.csv"
    other.write_text(table.read_text().replace("Film", "Image"))
    assert_refused(run_module(*bench, "--csv", other), "not those of the CSV")
    other.write_text("impression\nx\n")
    assert_refused(run_module(*bench, "--csv", other), "1 rows", "96")
    assert_refused(run_module("bench.loader", "--shards", tmp_path), "manifest.json")
    assert_refused(run_module(*bench, "--rounds", "0"), "--rounds 0")


def test_demo_keeps_its_hands_off(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    assert_refused(run_module("bench.demo", "--out", tmp_path), "not empty")
    assert (tmp_path / "precious").exists()
